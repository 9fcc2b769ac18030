"use strict";
// Draws the gallery from the JSON block. Text enters the document as text nodes only, so a prompt can say anything.
//
// Words: a *set* is what all models drew for one prompt and one seed: {seed, cells: [one per model, or null]}.
// Column 0 is the base; a *delta* is a reward minus the base's reward in the same set; null where either abstains.

const data = JSON.parse(document.getElementById("data").textContent);
const { models, rewards, prompts } = data;
const last = models.length - 1;
const compared = models.map((_, index) => index).slice(1);
const byId = (id) => document.getElementById(id);

/** An element with properties or attributes, and children; strings among the children become text. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// ---------------------------------------------------------------- numbers

const mean = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};

function value(set, model, reward) {
  return set.cells[model] ? set.cells[model].rewards[reward] : null;
}

function delta(set, model, reward) {
  const here = value(set, model, reward);
  const base = value(set, 0, reward);
  return model === 0 || here === null || base === null ? null : here - base;
}

const allSets = prompts.flatMap((prompt) => prompt.sets);

/** Where a reward's bars begin and end, and how many decimals its values need. */
function scaleOf(reward) {
  let low = Infinity;
  let high = -Infinity;
  let digits = 2;
  for (const set of allSets) {
    for (let model = 0; model <= last; model++) {
      const v = value(set, model, reward);
      if (v === null) continue;
      low = Math.min(low, v);
      high = Math.max(high, v);
      if (Math.abs(v * 100 - Math.round(v * 100)) > 1e-6) digits = 3;
    }
  }
  if (low > high) [low, high] = [0, 1];
  if (Math.max(Math.abs(low), Math.abs(high)) >= 10) digits = 2;
  if (low >= 0 && high <= 1 && high - low >= 0.25) return { low: 0, high: 1, digits };
  const room = (high - low) * 0.08 || 0.5;
  return { low: low - room, high, digits };
}

const scales = rewards.map((_, reward) => scaleOf(reward));

const shown = (v, digits) => (v === null ? "–" : v.toFixed(digits).replace("-", "−"));

/** {text, tone} of a difference: an arrow and a sign, so that colour is never the only sign. */
function change(d, digits) {
  if (d === null) return { text: "", tone: "" };
  const size = Math.abs(d).toFixed(digits);
  if (Number(size) === 0) return { text: "=", tone: "same" };
  return d > 0 ? { text: `▲ +${size}`, tone: "up" } : { text: `▼ −${size}`, tone: "down" };
}

/** One line: label, value, change, and a bar on which the change stands out in colour. */
function rewardLine(label, reward, v, d, digits) {
  const { low, high } = scales[reward];
  const { text, tone } = change(d, digits);
  const at = (x) => `${(100 * Math.min(1, Math.max(0, (x - low) / (high - low)))).toFixed(1)}%`;
  const bar = el("i", { className: "track" });
  if (v !== null) {
    const base = d === null ? v : v - d;
    bar.style.setProperty("--a", at(Math.min(v, base)));
    bar.style.setProperty("--b", at(Math.max(v, base)));
  }
  const silent = v === null;
  return el("li", { className: `reward ${silent ? "abstains" : tone}`, title: silent ? `${label} abstains` : label },
    el("span", { className: "name" }, label),
    el("span", { className: "value" }, shown(v, digits)),
    el("span", { className: "delta" }, text),
    bar);
}

// ---------------------------------------------------------------- state: what the page shows, mirrored in location.hash

const defaults = { q: "", kind: "", sort: "", model: models[last] ?? "", changed: "", size: "m", open: "" };
let state = { ...defaults };

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { ...defaults };
  for (const name of Object.keys(defaults)) if (given.has(name)) state[name] = given.get(name);
  if (!models.includes(state.model)) state.model = defaults.model;
  if (!sortOptions().some((option) => option.key === state.sort)) state.sort = "";
  if (!kinds.includes(state.kind)) state.kind = "";
  if (!["s", "m", "l"].includes(state.size)) state.size = "m";
}

function writeHash(push = false) {
  const kept = Object.entries(state).filter(([name, v]) => v !== defaults[name]);
  const hash = `#${new URLSearchParams(kept)}`;
  if (hash === (location.hash || "#")) return;
  try {
    history[push ? "pushState" : "replaceState"](null, "", hash);
  } catch {
    location.hash = hash; // browsers that forbid the above to pages opened from disk
  }
}

// ---------------------------------------------------------------- which sets are shown, in which order

const kinds = [...new Set(prompts.map((prompt) => prompt.kind).filter((kind) => kind !== null))];
const folded = (text) => text.normalize("NFKC").toLowerCase();
const haystack = new Map(prompts.map((prompt) => [prompt, folded(prompt.prompt)]));

/** The orders on offer: key is `REWARD:WHAT`, sign 1 puts the smallest first. */
function sortOptions() {
  const options = [{ key: "", label: "Prompt order" }];
  rewards.forEach((name, reward) => {
    if (last > 0) {
      options.push({ key: `${name}:loss`, label: `${name}: worst regressions first`, reward, of: delta, sign: 1 });
      options.push({ key: `${name}:gain`, label: `${name}: largest gains first`, reward, of: delta, sign: -1 });
    }
    options.push({ key: `${name}:low`, label: `${name}: lowest first`, reward, of: value, sign: 1 });
    options.push({ key: `${name}:high`, label: `${name}: highest first`, reward, of: value, sign: -1 });
  });
  return options;
}

function changed(set) {
  return compared.some((model) => rewards.some((_, reward) => {
    const here = value(set, model, reward);
    const base = value(set, 0, reward);
    return here === null || base === null ? here !== base : change(here - base, scales[reward].digits).tone !== "same";
  }));
}

/** [{prompt, sets, key}] after filter and order: a prompt stands where its first seed would; abstentions come last. */
function selection() {
  const words = folded(state.q).split(/\s+/).filter(Boolean);
  const order = sortOptions().find((option) => option.key === state.sort);
  const model = models.indexOf(state.model);
  const keyOf = (set) => (order.of ? order.of(set, model, order.reward) : null);
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return order.sign * (a - b);
  };
  const chosen = [];
  for (const prompt of prompts) {
    if (state.kind && prompt.kind !== state.kind) continue;
    if (!words.every((word) => haystack.get(prompt).includes(word))) continue;
    const sets = state.changed ? prompt.sets.filter(changed) : [...prompt.sets];
    if (!sets.length) continue;
    if (order.of) sets.sort((a, b) => compare(keyOf(a), keyOf(b)));
    chosen.push({ prompt, sets, key: keyOf(sets[0]), order });
  }
  return order.of ? chosen.sort((a, b) => compare(a.key, b.key)) : chosen;
}

// ---------------------------------------------------------------- the grid

const rowOf = new Map(); // prompt -> its nodes, drawn once and moved about afterwards
const setNodes = new Map(); // set -> its node
const promptOf = new Map(prompts.flatMap((prompt) => prompt.sets.map((set) => [set, prompt])));
let order = []; // the sets on the page, from top to bottom
let slots = 1; // how many sets stand beside each other
let current = null; // the one picture that the Tab key reaches; arrow keys move on from it

function placeholder(text) {
  return el("span", { className: "placeholder" }, text);
}

/** The picture in a box of its own shape, or a label where there is none. */
function picture(cell, alt, file, lazy) {
  if (!cell) return placeholder("No picture");
  if (!cell.image) return placeholder(cell.note);
  const image = el("img", { alt, width: cell.width, height: cell.height, decoding: "async" });
  if (Math.max(cell.width, cell.height) <= 128) image.className = "tiny";
  image.style.aspectRatio = `${cell.width} / ${cell.height}`;
  image.onerror = () => image.replaceWith(placeholder(`Missing file: ${file.split("/").pop()}`));
  if (lazy) image.loading = "lazy";
  image.src = file;
  return image;
}

function rewardList(set, model) {
  const list = el("ul", { className: model ? "rewards" : "rewards first" });
  if (set.cells[model]) {
    rewards.forEach((name, reward) => {
      list.append(rewardLine(name, reward, value(set, model, reward), delta(set, model, reward), scales[reward].digits));
    });
  }
  return list;
}

function drawSet(prompt, set) {
  const node = el("div", { className: "set", "data-seed": set.seed });
  node.append(el("p", { className: "seed" }, `seed ${set.seed}`));
  set.cells.forEach((cell, model) => {
    const alt = `${models[model]}, seed ${set.seed}: ${prompt.prompt}`;
    const button = el("button", { className: "picture", type: "button", tabIndex: -1, "aria-label": alt },
      picture(cell, alt, cell && (cell.thumb || cell.image), true));
    button.onclick = () => openDetail(set);
    button.onfocus = () => setCurrent(button);
    node.append(el("div", { className: "cell" }, button, rewardList(set, model)));
  });
  setNodes.set(set, node);
  return node;
}

function drawRow(prompt) {
  const facts = el("p", { className: "facts" });
  if (prompt.kind !== null) facts.append(el("span", { className: "kind" }, prompt.kind));
  const key = el("p", { className: "key" });
  const words = el("div", { className: "words" }, el("h2", { dir: "auto" }, prompt.prompt), facts, key);
  const sets = el("div", { className: "sets" });
  const node = el("section", { className: "row", "data-prompt": prompt.id, "aria-label": prompt.prompt }, words, sets);
  node.style.setProperty("--seeds", prompt.sets.length);
  prompt.sets.forEach((set) => sets.append(drawSet(prompt, set)));
  const row = { node, sets, key };
  rowOf.set(prompt, row);
  return row;
}

/** Below the prompt, the number that put it here. */
function drawKey(node, { key, sets, order: by }) {
  node.replaceChildren();
  if (!by.of) return;
  const { digits } = scales[by.reward];
  const { text, tone } = by.of === delta ? change(key, digits) : { text: shown(key, digits), tone: "" };
  const whose = last > 0 ? `, ${state.model}` : "";
  const seed = sets.length > 1 ? `, seed ${sets[0].seed}` : "";
  node.append(el("b", { className: tone }, text || "–"), ` ${rewards[by.reward]}${whose}${seed}`);
}

function setCurrent(button) {
  if (current) current.tabIndex = -1;
  current = button;
  if (current) current.tabIndex = 0;
}

function buttonOf(set, model) {
  return setNodes.get(set).querySelectorAll(".picture")[model];
}

function drawGrid() {
  const chosen = selection();
  order = chosen.flatMap((entry) => entry.sets);
  byId("grid").replaceChildren(...chosen.map((entry) => {
    const row = rowOf.get(entry.prompt) || drawRow(entry.prompt);
    const nodes = entry.sets.map((set) => setNodes.get(set));
    if (nodes.length !== row.sets.children.length || nodes.some((node, i) => node !== row.sets.children[i])) {
      row.sets.replaceChildren(...nodes);
    }
    drawKey(row.key, entry);
    return row.node;
  }));
  if (!current || !current.isConnected) setCurrent(order.length ? buttonOf(order[0], 0) : null);
  drawCount(chosen.length);
  drawSummary();
}

function drawCount(rows) {
  const all = prompts.length;
  byId("count").textContent = rows === all ? count(all, "prompt") : `${rows} of ${count(all, "prompt")}`;
  const empty = byId("empty");
  empty.hidden = rows > 0;
  empty.textContent = all ? "No prompt matches. " : "This gallery holds no pictures.";
  if (all && !rows) {
    empty.append(el("button", { type: "button", onclick: () => update({ q: "", kind: "", changed: "" }) }, "Show all"));
  }
}

/** Arrow keys walk over the pictures: left and right in reading order, up and down by lines of sets. */
function walkGrid(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
  const button = event.target.closest(".picture");
  if (!step || !button || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const node = button.closest(".set");
  const index = order.findIndex((set) => setNodes.get(set) === node);
  const model = [...node.querySelectorAll(".picture")].indexOf(button);
  const along = index * models.length + model + step;
  const target = event.key === "ArrowUp" || event.key === "ArrowDown"
    ? [order[nextLine(index, step)], model]
    : [order[Math.floor(along / models.length)], along % models.length];
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

// ---------------------------------------------------------------- head: facts, tables, means, legend

const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

function drawHead() {
  byId("title").textContent = data.title;
  byId("subtitle").textContent = data.subtitle;
  byId("subtitle").hidden = !data.subtitle;
  const pictures = allSets.reduce((n, set) => n + set.cells.filter(Boolean).length, 0);
  const facts = [count(models.length, "model"), count(prompts.length, "prompt"), count(pictures, "picture")];
  byId("facts").textContent = facts.join(" · ");
}

function drawTables() {
  const numeric = /^[▲▼=+−<>~≈±\s-]*\d[\d\s.,%±+−×x()[\]▲▼–-]*$|^[–-]?$/;
  byId("tables").hidden = !data.tables.length;
  for (const table of data.tables) {
    const side = table.header.map((_, i) => (i && table.rows.every((row) => numeric.test(row[i])) ? "number" : ""));
    const tone = (text) => ({ "▲": " up", "▼": " down" })[text[0]] ?? "";
    const line = (tag, row) => el("tr", {}, ...row.map((text, i) => el(tag, { className: side[i] + tone(text), dir: "auto" }, text)));
    const scroller = el("div", { className: "scroller", tabIndex: 0, role: "group", "aria-label": table.title },
      el("table", {},
        el("thead", {}, line("th", table.header)),
        el("tbody", {}, ...table.rows.map((row) => line("td", row)))));
    byId("tables").append(el("section", { className: "card" }, el("h2", {}, table.title), scroller));
  }
}

/** One card per reward: every model's mean over the pictures shown, and how often it beats the base. */
function drawSummary() {
  const cards = rewards.map((name, reward) => {
    const lines = models.map((model, index) => {
      const deltas = order.map((set) => delta(set, index, reward));
      const line = rewardLine(model, reward, mean(order.map((set) => value(set, index, reward))), mean(deltas), 3);
      const tones = deltas.map((d) => change(d, scales[reward].digits).tone);
      const times = (tone) => tones.filter((t) => t === tone).length;
      const text = `${times("up")} better, ${times("down")} worse, ${times("same")} equal`;
      if (index) line.append(el("span", { className: "tally" }, text));
      return line;
    });
    const { low, high } = scales[reward];
    const range = `${shown(low, 2)} to ${shown(high, 2)}`;
    return el("section", { className: "card" },
      el("h2", {}, el("span", {}, name), el("span", { className: "range", title: "Where the bars begin and end" }, range)),
      el("ul", { className: last > 0 ? "rewards" : "rewards first" }, ...lines));
  });
  byId("summary").hidden = !rewards.length || !allSets.length;
  byId("summary").replaceChildren(...cards);
}

/** A model's name; the base is marked, unless that is its name already. */
function nameOf(model) {
  const name = el("span", { className: "model-name", dir: "auto", title: models[model] }, models[model]);
  const marked = model === 0 && last > 0 && folded(models[0]) !== "base";
  return marked ? [name, el("span", { className: "mark" }, "base")] : [name];
}

function drawColumns() {
  const heads = Array.from({ length: slots }, () =>
    el("div", { className: "set" }, ...models.map((_, model) => el("span", { className: "column" }, ...nameOf(model)))));
  byId("columns").replaceChildren(el("div", { className: "columns-inner" },
    el("span", { className: "words" }), el("div", { className: "sets" }, ...heads)));
}

function drawLegend() {
  const against = `Changes compare the same prompt and seed with ${models[0]}: ▲ better, ▼ worse, = equal. `;
  byId("legend").append(
    el("p", {}, last > 0 ? against : "", "A dash means that the reward abstains. Means are over the pictures shown."),
    el("p", {}, "Arrow keys walk over the pictures, Enter opens one, Esc closes it. The address is a link to what you see."));
}

// ---------------------------------------------------------------- controls

function drawControls() {
  byId("kind").append(el("option", { value: "" }, "All kinds"), ...kinds.map((kind) => el("option", { value: kind }, kind)));
  byId("kind").hidden = !kinds.length;
  byId("sort").append(...sortOptions().map((option) => el("option", { value: option.key }, option.label)));
  byId("sort").hidden = !rewards.length;
  byId("model").append(...models.map((name) => el("option", { value: name }, name)));
  byId("changed").parentNode.hidden = last < 1 || !rewards.length;
  for (const [key, label, name] of [["s", "S", "Small"], ["m", "M", "Medium"], ["l", "L", "Large"]]) {
    const input = el("input", { type: "radio", name: "size", value: key, "aria-label": `${name} pictures` });
    input.onchange = () => update({ size: key });
    byId("size").append(el("label", { title: `${name} pictures` }, input, el("span", {}, label)));
  }
  let timer = 0;
  byId("search").oninput = (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => update({ q: event.target.value }), 120);
  };
  for (const name of ["kind", "sort", "model"]) byId(name).onchange = (event) => update({ [name]: event.target.value });
  byId("changed").onchange = (event) => update({ changed: event.target.checked ? "1" : "" });
  byId("controls").onsubmit = (event) => event.preventDefault();
}

function syncControls() {
  if (byId("search").value !== state.q) byId("search").value = state.q;
  for (const name of ["kind", "sort", "model"]) byId(name).value = state[name];
  byId("model").hidden = !state.sort || last < 2;
  byId("changed").checked = state.changed === "1";
  byId("size").querySelector(`[value=${state.size}]`).checked = true;
  document.documentElement.dataset.size = state.size;
}

function update(changes) {
  state = { ...state, ...changes };
  writeHash();
  syncControls();
  drawGrid();
  fitGrid();
}

// ---------------------------------------------------------------- detail: one set, large

const detail = byId("detail");
const linkOf = (set) => `${promptOf.get(set).id}.${set.seed}`;
let open = null; // the set in the detail view

function openDetail(set) {
  open = set;
  const push = !detail.open;
  state.open = linkOf(set);
  writeHash(push); // a step in the history, so that the browser's Back button closes the view
  drawDetail();
  if (push) detail.showModal();
  byId("stage").focus();
}

function closeDetail() {
  const set = open;
  open = null;
  state.open = "";
  writeHash();
  if (!set || !setNodes.has(set) || !setNodes.get(set).isConnected) return;
  const model = current && setNodes.get(set).contains(current) ? current : buttonOf(set, 0);
  model.focus({ preventScroll: true });
  model.scrollIntoView({ block: "nearest" });
}

/** Move `step` sets on, or to the neighbouring prompt. */
function moveDetail(step, byPrompt = false) {
  let index = order.indexOf(open);
  const prompt = promptOf.get(open);
  do index += step;
  while (byPrompt && order[index] && promptOf.get(order[index]) === prompt);
  if (order[index]) openDetail(order[index]);
}

function drawDetail() {
  const prompt = promptOf.get(open);
  const index = order.indexOf(open);
  byId("detail-prompt").textContent = prompt.prompt;
  const facts = [prompt.kind, `seed ${open.seed}`, index < 0 ? null : `${index + 1} of ${order.length}`];
  byId("detail-facts").textContent = facts.filter((fact) => fact !== null).join(" · ");
  byId("previous").disabled = index <= 0;
  byId("next").disabled = index >= order.length - 1;
  detail.style.setProperty("--ratio", Math.max(...open.cells.map((cell) => (cell?.image ? cell.width / cell.height : 1))));
  byId("stage").replaceChildren(...open.cells.map((cell, model) => drawFigure(prompt, open, model)));
  byId("stage").scrollTo(0, 0);
  for (const cell of order[index + 1]?.cells ?? []) if (cell?.image) new Image().src = cell.image;
}

function drawFigure(prompt, set, model) {
  const cell = set.cells[model];
  const alt = `${models[model]}, seed ${set.seed}: ${prompt.prompt}`;
  const caption = el("figcaption", {}, ...nameOf(model));
  const figure = el("figure", {}, caption, picture(cell, alt, cell && cell.image, false), rewardList(set, model));
  if (cell?.image) {
    caption.append(el("a", { href: cell.image, target: "_blank", title: "Open the original" }, `${cell.width} × ${cell.height}`));
  }
  if (cell && Object.keys(cell.details).length) figure.append(drawDetails(cell.details));
  return figure;
}

function drawDetails(details) {
  const list = el("dl", { className: "details" });
  for (const [name, text] of Object.entries(details)) {
    const line = el("dd", { dir: "auto" }, text);
    const wide = name === "command" || text.length > 40;
    list.append(el("div", { className: wide ? "wide" : "" }, el("dt", {}, name), line));
    if (name === "command") {
      line.className = "command";
      line.previousSibling.append(el("button", { type: "button", className: "copy", onclick: (event) => copy(text, event.target) }, "Copy"));
    }
  }
  return list;
}

async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = label; }, 1500);
}

function detailKeys(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const move = { ArrowLeft: [-1], ArrowRight: [1], ArrowUp: [-1, true], ArrowDown: [1, true] }[event.key];
  if (!move) return;
  event.preventDefault();
  moveDetail(...move);
}

function wireDetail() {
  detail.onkeydown = detailKeys;
  detail.onclose = closeDetail;
  detail.onclick = (event) => { if (event.target === detail) detail.close(); };
  byId("previous").onclick = () => moveDetail(-1);
  byId("next").onclick = () => moveDetail(1);
  byId("close").onclick = () => detail.close();
  byId("link").onclick = (event) => copy(location.href, event.target);
}

// ---------------------------------------------------------------- start

/** As many sets beside each other as fit, where prompts have several seeds. */
function fitSlots() {
  const sheet = getComputedStyle(document.documentElement);
  const px = (name) => parseFloat(sheet.getPropertyValue(name));
  const padding = 2 * parseFloat(getComputedStyle(document.body).paddingLeft);
  const room = Math.min(document.documentElement.clientWidth - padding, px("--widest"));
  const width = models.length * (px("--unit") + px("--gap")) - px("--gap") + px("--between");
  const most = prompts.reduce((n, prompt) => Math.max(n, prompt.sets.length), 1);
  const wanted = Math.max(1, Math.min(most, Math.floor((room - px("--words")) / width)));
  document.documentElement.classList.toggle("roomy", wanted === 1);
  if (wanted === slots && byId("columns").firstChild) return;
  slots = wanted;
  document.documentElement.style.setProperty("--slots", slots);
  drawColumns();
}

/** The page scrolls; the grid scrolls sideways in itself only where its columns do not fit, and the heads follow. */
function fitGrid() {
  const grid = byId("grid");
  if (prompts.length) fitSlots();
  grid.classList.remove("scrolls");
  grid.classList.toggle("scrolls", grid.scrollWidth > grid.clientWidth + 1);
  byId("columns").scrollLeft = grid.scrollLeft;
  document.documentElement.style.setProperty("--bar", `${byId("bar").offsetHeight}px`);
}

function applyHash() {
  readHash();
  syncControls();
  drawGrid();
  fitGrid();
  const set = allSets.find((candidate) => linkOf(candidate) === state.open);
  if (set) openDetail(set);
  else if (detail.open) detail.close();
}

document.documentElement.style.setProperty("--models", Math.max(1, models.length));
drawHead();
drawTables();
drawControls();
drawLegend();
wireDetail();
byId("bar").hidden = !prompts.length;
byId("grid").onkeydown = walkGrid;
byId("grid").onscroll = () => { byId("columns").scrollLeft = byId("grid").scrollLeft; };
applyHash();
addEventListener("hashchange", applyHash);
addEventListener("resize", fitGrid);
