// Rows of prompts. A row's words are always there, for the browser's own search; its pictures come when it nears the window.

const rows = new Map(); // prompt -> {node, sets, key, entry, filled}
const setNodes = new Map(); // set -> its node
const near = new Set(); // rows near the window
let order = []; // the sets on the page, from top to bottom
let slots = 1; // how many sets stand beside each other
let current = null; // the one picture that the Tab key reaches; arrow keys move on from it

const inPairs = () => state.view === "wipe" || state.view === "blink";
const across = () => (inPairs() ? 1 : models.length); // pictures of a set beside each other

const approach = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const row = target.row;
    if (isIntersecting && row.node.isConnected) {
      fillRow(row);
      near.add(row);
      followPair(row.node);
    } else {
      near.delete(row);
    }
  }
}, { rootMargin: "900px 0px" });

function pictureButton(set, label, ...content) {
  const button = el("button", { className: "picture", type: "button", tabIndex: -1, "aria-label": label }, ...content);
  button.onclick = () => openDetail(set);
  button.onfocus = () => setCurrent(button);
  return button;
}

function drawSet(prompt, set) {
  const node = el("div", { className: "set" }, el("p", { className: "seed" }, `seed ${set.seed}`));
  if (inPairs()) {
    const label = `${state.base} and ${state.model}, seed ${set.seed}: ${prompt.prompt}`;
    const button = pictureButton(set, label, pairBox(set, state.view, prompt.prompt));
    node.append(el("div", { className: "cell" }, button, pairRewards(set)));
  } else {
    const base = baseIndex();
    set.cells.forEach((cell, model) => {
      const alt = `${models[model]}, seed ${set.seed}: ${prompt.prompt}`;
      node.append(el("div", { className: "cell" }, pictureButton(set, alt, picture(cell, alt)), rewardList(set, model, base)));
    });
  }
  setNodes.set(set, node);
  return node;
}

function drawRow(entry) {
  const { prompt } = entry;
  const facts = el("p", { className: "facts" });
  if (prompt.kind !== null) facts.append(el("span", { className: "kind" }, prompt.kind));
  const key = el("p", { className: "key" });
  const words = el("div", { className: "words" }, el("h2", { dir: "auto" }, prompt.prompt), facts, key);
  const sets = el("div", { className: "sets" });
  const node = el("section", { className: "row waiting", "aria-label": prompt.prompt }, words, sets);
  const row = { node, sets, key, entry, filled: false };
  node.row = row;
  rows.set(prompt, row);
  approach.observe(node);
  return row;
}

/** The pictures of a row: each set drawn once, and moved about afterwards. */
function fillRow(row) {
  row.filled = true;
  row.node.classList.remove("waiting");
  const nodes = row.entry.sets.map((set) => setNodes.get(set) || drawSet(row.entry.prompt, set));
  if (nodes.length !== row.sets.children.length || nodes.some((node, i) => node !== row.sets.children[i])) {
    row.sets.replaceChildren(...nodes);
  }
}

/** Below the prompt, the number that put it here. */
function drawKey(node, { key, sets, by }) {
  node.replaceChildren();
  if (!by.of || key === null) return;
  const digits = by.reward === undefined ? 2 : scales[by.reward].digits;
  const { text, tone } = by.of === delta ? change(key, digits) : { text: shown(key, digits), tone: "" };
  const what = by.reward === undefined ? "suspicion" : rewards[by.reward];
  const seed = sets.length > 1 ? `, seed ${sets[0].seed}` : "";
  node.append(el("b", { className: tone }, text || "–"), ` ${what}${pairable ? `, ${state.model}` : ""}${seed}`);
}

function forgetRows() {
  for (const row of rows.values()) approach.unobserve(row.node);
  rows.clear();
  setNodes.clear();
  near.clear();
  setCurrent(null);
}

function drawGrid(chosen) {
  byId("grid").replaceChildren(...chosen.map((entry) => {
    const row = rows.get(entry.prompt) || drawRow(entry);
    row.entry = entry;
    row.node.style.setProperty("--lines", Math.ceil(entry.sets.length / slots));
    if (row.filled) fillRow(row);
    drawKey(row.key, entry);
    return row.node;
  }));
  if (!current || !current.isConnected) setCurrent(null);
  if (!current && order.length) setCurrent(buttonOf(order[0], 0));
}

// ---------------------------------------------------------------- walking with the arrow keys

function setCurrent(button) {
  if (current) current.tabIndex = -1;
  current = button;
  if (current) current.tabIndex = 0;
}

function buttonOf(set, model) {
  if (!setNodes.has(set)) fillRow(rows.get(promptOf.get(set)));
  const buttons = setNodes.get(set).querySelectorAll(".picture");
  return buttons[Math.min(model, buttons.length - 1)];
}

/** Left and right in reading order, up and down by lines of sets. */
function walkGrid(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
  const button = event.target.closest(".picture");
  if (!step || !button || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const node = button.closest(".set");
  const index = order.findIndex((set) => setNodes.get(set) === node);
  const model = [...node.querySelectorAll(".picture")].indexOf(button);
  const along = index * across() + model + step;
  const target = event.key === "ArrowUp" || event.key === "ArrowDown"
    ? [order[nextLine(index, step)], model]
    : [order[Math.floor(along / across())], along % across()];
  if (target[0]) buttonOf(...target).focus();
}

/** The index in `order` of the set one line below (step 1) or above (step -1), in the same slot where there is one. */
function nextLine(index, step) {
  const rowSets = (i) => order.filter((set) => promptOf.get(set) === promptOf.get(order[i]));
  const here = rowSets(index);
  const start = order.indexOf(here[0]);
  const slot = (index - start) % slots;
  const line = Math.floor((index - start) / slots) + step;
  if (line >= 0 && line * slots < here.length) return start + Math.min(line * slots + slot, here.length - 1);
  const edge = step > 0 ? start + here.length : start - 1; // first set of the next prompt, or last of the one before
  if (!order[edge]) return -1;
  const there = rowSets(edge);
  const first = order.indexOf(there[0]);
  const lastLine = step > 0 ? 0 : Math.floor((there.length - 1) / slots) * slots;
  return first + Math.min(lastLine + slot, there.length - 1);
}

// ---------------------------------------------------------------- columns

/** A model's name; the base is marked, unless that is its name already. */
function nameOf(model) {
  const name = el("span", { className: "model-name", dir: "auto", title: models[model] }, models[model]);
  const marked = model === baseIndex() && pairable && folded(models[model]) !== "base";
  return marked ? [name, el("span", { className: "mark" }, "base")] : [name];
}

function columnHeads() {
  if (!inPairs()) return models.map((_, model) => el("span", { className: "column" }, ...nameOf(model)));
  const side = (name, mark) => el("span", { className: "side" },
    el("b", { className: "letter" }, mark), el("span", { className: "model-name", title: name }, name));
  return [el("span", { className: "column sides" }, side(state.base, "A"), side(state.model, "B"))];
}

function drawColumns() {
  const heads = Array.from({ length: slots }, () => el("div", { className: "set" }, ...columnHeads()));
  byId("columns").replaceChildren(el("div", { className: "columns-inner" },
    el("span", { className: "words" }), el("div", { className: "sets" }, ...heads)));
}

/** As many sets beside each other as fit, where prompts have several seeds; pairs in one place fill the width of the grid. */
function fitSlots() {
  const sheet = getComputedStyle(root);
  const px = (name) => parseFloat(sheet.getPropertyValue(name));
  const padding = 2 * parseFloat(getComputedStyle(document.body).paddingLeft);
  const [unit, gap, between, words] = ["--unit", "--gap", "--between", "--words"].map(px);
  const room = Math.min(root.clientWidth - padding, px("--widest")) - words;
  const most = prompts.reduce((n, prompt) => Math.max(n, prompt.sets.length), 1);
  const fitting = (space, width) => Math.max(1, Math.min(most, Math.floor((space + between) / (width + between))));
  const set = models.length * (unit + gap) - gap;
  const fit = fitting(room - between, set);
  slots = inPairs() ? fitting(Math.min(room - between, fit * (set + between) - between), 1.3 * unit) : fit;
  root.classList.toggle("roomy", fit === 1);
  const counts = { models: Math.max(1, models.length), fit, slots, across: Math.max(1, across()) };
  for (const [name, number] of Object.entries(counts)) root.style.setProperty(`--${name}`, number);
  drawColumns();
}

/** The page scrolls; the grid scrolls sideways in itself only where its columns do not fit, and the heads follow. */
function fitGrid() {
  const grid = byId("grid");
  if (prompts.length) fitSlots();
  grid.classList.remove("scrolls");
  grid.classList.toggle("scrolls", grid.scrollWidth > grid.clientWidth + 1);
  byId("columns").scrollLeft = grid.scrollLeft;
  root.style.setProperty("--bar", `${byId("bar").offsetHeight}px`);
}
