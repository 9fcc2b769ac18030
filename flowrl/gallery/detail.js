// One set, large: side by side, with a wipe, or one picture after the other.

const detail = byId("detail");
let open = null; // the set in the detail view
let blinked = 0; // the model that blinking shows

function openDetail(set) {
  open = set;
  const push = !detail.open;
  state.open = linkOf(set);
  writeHash(push); // a step in the history, so that the browser's Back button closes the view
  if (push) detail.showModal();
  drawDetail();
  byId("stage").focus();
}

function closeDetail() {
  const set = open;
  open = null;
  state.open = "";
  writeHash();
  byId("stage").replaceChildren();
  if (!set || !order.includes(set) || state.view === "film" || state.view === "vote") return;
  const button = current && setNodes.get(set)?.contains(current) ? current : buttonOf(set, 0);
  button.focus({ preventScroll: true });
  button.scrollIntoView({ block: "nearest" });
}

/** Move `step` sets on, or to the neighbouring prompt. */
function moveDetail(step, byPrompt = false) {
  let index = order.indexOf(open);
  const prompt = promptOf.get(open);
  do index += step;
  while (byPrompt && order[index] && promptOf.get(order[index]) === prompt);
  if (order[index]) openDetail(order[index]);
}

function setMode(mode) {
  state.mode = mode;
  writeHash();
  drawDetail();
}

function drawDetail() {
  const prompt = promptOf.get(open);
  const index = order.indexOf(open);
  byId("detail-prompt").textContent = prompt.prompt;
  const facts = [prompt.kind, `seed ${open.seed}`, index < 0 ? null : `${index + 1} of ${order.length}`];
  byId("detail-facts").textContent = facts.filter((fact) => fact !== null).join(" · ");
  byId("previous").disabled = index <= 0;
  byId("next").disabled = index >= order.length - 1;
  for (const button of byId("modes").children) button.setAttribute("aria-pressed", String(button.value === state.mode));
  byId("detail-pair").hidden = state.mode !== "wipe" || models.length < 3;
  detail.dataset.mode = state.mode;
  detail.style.setProperty("--ratio", Math.max(...open.cells.map((cell) => (cell?.width ? cell.width / cell.height : 1))));
  blinked = state.mode === "blink" ? Math.min(blinked, last) : 0;
  byId("stage").replaceChildren(...{ side: drawSides, wipe: drawWipe, blink: drawBlink }[state.mode](prompt, open));
  byId("stage").scrollTo(0, 0);
  followPair(byId("stage"));
  for (const cell of order[index + 1]?.cells ?? []) if (cell?.image && !cell.video) new Image().src = cell.image;
}

const drawSides = (prompt, set) => models.map((_, model) => drawFigure(prompt, set, model));

function drawFigure(prompt, set, model) {
  const cell = set.cells[model];
  const alt = `${models[model]}, seed ${set.seed}: ${prompt.prompt}`;
  const caption = el("figcaption", {}, ...nameOf(model));
  const shot = picture(cell, alt, { lazy: false, original: true });
  const figure = el("figure", {}, caption, shot, rewardList(set, model, baseIndex()));
  if (cell?.image) {
    const size = cell.width ? `${cell.width} × ${cell.height}` : "Original";
    caption.append(el("a", { href: cell.image, target: "_blank", title: "Open the original" }, size));
  }
  if (cell && Object.keys(cell.details).length) figure.append(drawDetails(cell.details));
  return figure;
}

function drawWipe(prompt, set) {
  const name = (model, mark) => el("span", { className: "side" }, el("b", { className: "letter" }, mark), ...nameOf(model));
  const names = el("figcaption", { className: "sides" }, name(baseIndex(), "A"), name(modelIndex(), "B"));
  return [el("figure", {}, names, pairBox(set, "wipe", prompt.prompt, true), pairRewards(set))];
}

/** All pictures in one place, one of them seen; a button for each. */
function drawBlink(prompt, set) {
  const chip = (name, model) => el("button", { type: "button", className: "chip", onclick: () => showBlink(model, true) }, name);
  const layers = models.map((name, model) => {
    const layer = picture(set.cells[model], `${name}, seed ${set.seed}: ${prompt.prompt}`, { lazy: false, original: true });
    layer.classList.add("layer");
    return layer;
  });
  const box = el("span", { className: "pair layers" }, ...layers);
  const first = set.cells.find((cell) => cell?.width);
  if (first) box.style.aspectRatio = `${first.width} / ${first.height}`;
  const chips = el("figcaption", { className: "chips" }, ...models.map(chip));
  queueMicrotask(() => showBlink(blinked));
  return [el("figure", {}, chips, box, el("div", { className: "of" }))];
}

function showBlink(model, stop = false) {
  if (stop) play(false);
  blinked = model;
  const stage = byId("stage");
  stage.querySelectorAll(".chip").forEach((chip, i) => chip.setAttribute("aria-pressed", String(i === model)));
  stage.querySelectorAll(".layers > *").forEach((layer, i) => layer.classList.toggle("on", i === model));
  stage.querySelector(".of")?.replaceChildren(rewardList(open, model, baseIndex()));
}

function nextBlink() {
  showBlink((blinked + 1) % models.length);
}

function drawDetails(details) {
  const list = el("dl", { className: "details" });
  for (const [name, text] of Object.entries(details)) {
    const line = el("dd", { dir: "auto" }, text);
    const wide = name === "command" || text.length > 24;
    list.append(el("div", { className: wide ? "wide" : "" }, el("dt", {}, name), line));
    if (name === "command") {
      line.className = "command";
      line.previousSibling.append(copyButton(() => text));
    }
  }
  return list;
}

function wireDetail() {
  detail.onclose = closeDetail;
  detail.onclick = (event) => { if (event.target === detail) detail.close(); };
  byId("previous").onclick = () => moveDetail(-1);
  byId("next").onclick = () => moveDetail(1);
  byId("close").onclick = () => detail.close();
  byId("link").onclick = (event) => copy(location.href, event.target);
  for (const button of byId("modes").children) button.onclick = () => setMode(button.value);
  byId("modes").hidden = !pairable;
}
