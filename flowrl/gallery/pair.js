// Two pictures in one place: A is the base, B the model that is compared with it. Wipe between them, or blink.

const pair = { at: 50, flipped: false }; // at: how much of A is seen, in percent; flipped: blinking shows B
const BLINK = 700; // milliseconds

/** The pictures of A and B on top of each other; what is missing is named instead. */
function pairBox(set, mode, prompt, big = false) {
  const cells = [set.cells[baseIndex()], set.cells[modelIndex()]];
  const names = [state.base, state.model];
  const lacking = cells.findIndex((cell) => !cell?.image);
  if (lacking >= 0) return placeholder(`${names[lacking]}: ${cells[lacking]?.note ?? "No picture"}`);
  const alt = (name) => `${name}, seed ${set.seed}: ${prompt}`;
  const pictures = cells.map((cell, i) => picture(cell, alt(names[i]), { lazy: !big, original: big }));
  pictures.forEach((node, i) => node.classList.add(i ? "over" : "under"));
  const box = el("span", { className: `pair ${mode}` }, ...pictures);
  if (cells[0].width) box.style.aspectRatio = `${cells[0].width} / ${cells[0].height}`;
  if (mode === "wipe") {
    box.append(el("i", { className: "edge" }));
    let from = 0; // where a press began: a sweep with the button down is no click
    box.onpointermove = (event) => wipeTo(event, box);
    box.onpointerdown = (event) => {
      from = event.clientX;
      wipeTo(event, box);
    };
    box.onclick = (event) => { if (Math.abs(event.clientX - from) > 4) event.stopPropagation(); };
  }
  return box;
}

function wipeTo(event, box) {
  if (event.pointerType === "touch" && event.buttons === 0) return;
  const { left, width } = box.getBoundingClientRect();
  setWipe(100 * (event.clientX - left) / width);
}

/** All wipes near the window have their edge in the same place, so that one sweep compares a whole page. */
function setWipe(at) {
  pair.at = Math.min(100, Math.max(0, at));
  byId("at").value = Math.round(pair.at);
  for (const row of near) followPair(row.node);
  followPair(byId("stage"));
}

function flip(flipped) {
  pair.flipped = flipped;
  for (const row of near) followPair(row.node);
  followPair(byId("stage"));
}

function followPair(node) {
  if (!inPairs() && !detail.open) return;
  node.style.setProperty("--at", `${pair.at}%`);
  node.classList.toggle("flipped", pair.flipped);
}

/** The rewards of A and B, and what the step from A to B changes. */
function pairRewards(set) {
  const list = el("ul", { className: "rewards" });
  const [base, model] = [baseIndex(), modelIndex()];
  rewards.forEach((name, reward) => {
    const { digits } = scales[reward];
    const [a, b] = [value(set, base, reward), value(set, model, reward)];
    const line = rewardLine(name, scales[reward], b, delta(set, model, reward, base));
    line.querySelector(".value").textContent = `${shown(a, digits)} → ${shown(b, digits)}`;
    list.append(line);
  });
  return list;
}

function startBlinking() {
  setInterval(() => {
    if (playing.on && state.view === "blink" && !detail.open && !document.hidden) flip(!pair.flipped);
    if (playing.on && detail.open && state.mode === "blink" && !document.hidden) nextBlink();
  }, BLINK);
}
