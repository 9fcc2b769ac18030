// The page as a whole.

let drawnAs = ""; // what the rows were drawn for: view and pair

function draw() {
  const as = JSON.stringify([state.view, state.base, inPairs() ? state.model : ""]);
  if (as !== drawnAs) forgetRows();
  drawnAs = as;
  playFilm(false);
  syncControls();
  const chosen = selection();
  order = chosen.flatMap((entry) => entry.sets);
  drawCount(chosen.length);
  if (state.view === "film") drawFilm();
  else if (state.view === "vote") drawVote(chosen);
  else {
    fitGrid();
    drawGrid(chosen);
    drawSummary();
  }
  fitGrid();
}

function update(changes) {
  state = checked({ ...state, ...changes });
  writeHash();
  draw();
}

function applyHash() {
  readHash();
  draw();
  const set = allSets.find((candidate) => linkOf(candidate) === state.open);
  if (set) openDetail(set);
  else if (detail.open) detail.close();
}

setTheme(store.get("flowrl-theme") ?? "");
root.style.setProperty("--rewards", rewards.length);
drawHead();
drawProblems();
drawTables();
drawControls();
drawLegend();
wireControls();
wireDetail();
wireFilm();
wireVote();
byId("bar").hidden = !prompts.length && !films.length;
byId("controls").hidden = !prompts.length && !films.length;
applyHash();
play(!matchMedia("(prefers-reduced-motion: reduce)").matches);
startBlinking();
addEventListener("hashchange", applyHash);
addEventListener("resize", fitGrid);
addEventListener("keydown", onKey);
