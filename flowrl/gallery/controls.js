// The bar above the pictures, the theme, the keys.

const KEYS = [
  { keys: ["g", "w", "b", "f", "v"], text: "grid, wipe, blink, film, vote" },
  { keys: ["/"], text: "search: words, and conditions like tiny_strict<0.5 or Δtiny_strict<0" },
  { keys: ["←", "→", "↑", "↓"], text: "walk over the pictures; in the film, from step to step" },
  { keys: ["Enter"], text: "open a picture; in the open view ← → are neighbours, ↑ ↓ prompts" },
  { keys: ["s", "w", "b"], text: "in the open view: side by side, wipe, blink" },
  { keys: ["1", "…", "9"], text: "in the open view, blinking: stop at this model" },
  { keys: ["[", "]"], text: "move the edge of a wipe" },
  { keys: ["p"], text: "pause or play: clips, blinking, the film" },
  { keys: ["←", "→", "↓", "↑", "⌫"], text: "vote: left, right, tie, skip, undo" },
  { keys: ["t"], text: "light, dark, or as the system has it" },
  { keys: ["Esc"], text: "close" },
];
const THEMES = { "": ["◐", " Auto"], light: ["○", " Light"], dark: ["●", " Dark"] };

function setTheme(theme) {
  const known = theme in THEMES ? theme : "";
  root.dataset.theme = known;
  const [sign, label] = THEMES[known];
  byId("theme").replaceChildren(sign, el("span", { className: "wide-only" }, label));
  store.set("flowrl-theme", known);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(root.dataset.theme) + 1) % names.length]);
}

function drawControls() {
  for (const [view, label] of [["grid", "Grid"], ["wipe", "Wipe"], ["blink", "Blink"], ["film", "Film"], ["vote", "Vote"]]) {
    const button = el("button", { type: "button", value: view, onclick: () => update({ view }) }, label);
    button.hidden = !has[view]();
    byId("views").append(button);
  }
  byId("views").hidden = VIEWS.filter((view) => has[view]()).length < 2;
  byId("kind").append(...options([{ value: "", label: "All kinds" }, ...kinds.map((kind) => ({ value: kind, label: kind }))]));
  byId("sort").append(...options(sortChoices()));
  byId("only").append(...options(onlyChoices()));
  const named = models.map((name) => ({ value: name, label: name }));
  for (const id of ["base", "model", "detail-base", "detail-model"]) byId(id).append(...options(named));
  for (const [key, label, name] of [["s", "S", "Small"], ["m", "M", "Medium"], ["l", "L", "Large"]]) {
    const input = el("input", { type: "radio", name: "size", value: key, "aria-label": `${name} pictures` });
    input.onchange = () => update({ size: key });
    byId("size").append(el("label", { title: `${name} pictures` }, input, el("span", {}, label)));
  }
  for (const { keys, text } of KEYS) {
    byId("keys").append(el("dt", {}, ...keys.map((key) => el("kbd", {}, key))), el("dd", {}, text));
  }
}

function wireControls() {
  let timer = 0;
  byId("search").oninput = (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => update({ q: event.target.value }), 120);
  };
  for (const name of ["kind", "sort", "only"]) byId(name).onchange = (event) => update({ [name]: event.target.value });
  for (const name of ["base", "model"]) {
    byId(name).onchange = (event) => choosePair(name, event.target.value);
    byId(`detail-${name}`).onchange = (event) => choosePair(name, event.target.value);
  }
  byId("controls").onsubmit = (event) => event.preventDefault();
  byId("at").oninput = (event) => setWipe(Number(event.target.value));
  byId("time").oninput = (event) => seek(Number(event.target.value) / 1000);
  byId("play").onclick = () => play(!playing.on);
  byId("theme").onclick = nextTheme;
  byId("keys-open").onclick = () => byId("help").showModal();
  byId("help-close").onclick = () => byId("help").close();
  byId("help").onclick = (event) => { if (event.target === byId("help")) byId("help").close(); };
  byId("grid").onkeydown = walkGrid;
  byId("grid").onscroll = () => { byId("columns").scrollLeft = byId("grid").scrollLeft; };
}

/** A and B differ: choosing one as the other changes places. */
function choosePair(name, chosen) {
  const other = name === "base" ? "model" : "base";
  update(state[other] === chosen ? { [name]: chosen, [other]: state[name] } : { [name]: chosen });
  if (detail.open) drawDetail();
}

function syncControls() {
  const { view } = state;
  const saved = view === "film" && reelNow()?.name.endsWith("/samples"); // its pictures have no columns to order by
  if (byId("search").value !== state.q) byId("search").value = state.q;
  for (const name of ["kind", "sort", "only", "base", "model"]) byId(name).value = state[name];
  byId("detail-base").value = state.base;
  byId("detail-model").value = state.model;
  byId("kind").hidden = !kinds.length || saved;
  byId("sort").hidden = !rewards.length || view === "vote" || saved;
  byId("only").hidden = !rewards.length || !pairable || view === "vote" || saved;
  byId("pair").hidden = models.length < 3 || saved || (view === "vote" && state.contest === "all");
  byId("size").hidden = view === "film" || view === "vote";
  byId("wiping").hidden = view !== "wipe";
  byId("time").hidden = !anyClips;
  byId("play").hidden = !(anyClips || view === "blink");
  byId("size").querySelector(`[value=${state.size}]`).checked = true;
  for (const button of byId("views").children) button.setAttribute("aria-pressed", String(button.value === view));
  root.dataset.size = state.size;
  root.dataset.view = view;
  for (const id of ["tables", "cards", "alarms"]) byId(id).classList.toggle("away", view === "film" || view === "vote");
  byId("film").hidden = view !== "film";
  byId("vote").hidden = view !== "vote";
  for (const id of ["grid", "columns", "legend"]) byId(id).hidden = view === "film" || view === "vote";
}

function drawCount(rowCount) {
  const all = prompts.length;
  byId("count").textContent = rowCount === all ? count(all, "prompt") : `${rowCount} of ${count(all, "prompt")}`;
  byId("count").classList.toggle("unseen", !all);
  const empty = byId("empty");
  empty.hidden = rowCount > 0 || state.view === "film" || state.view === "vote";
  empty.textContent = all ? "No prompt matches. " : "This gallery holds no pictures.";
  if (all && !rowCount) {
    empty.append(el("button", { type: "button", onclick: () => update({ q: "", kind: "", only: "" }) }, "Show all"));
  }
}

// ---------------------------------------------------------------- keys

const gridKeys = {
  g: () => update({ view: "grid" }), w: () => update({ view: "wipe" }), b: () => update({ view: "blink" }),
  f: () => update({ view: "film" }), v: () => update({ view: "vote" }), "/": () => byId("search").focus(),
};
const detailKeys = {
  s: () => setMode("side"), w: () => setMode("wipe"), b: () => setMode("blink"),
  ArrowLeft: () => moveDetail(-1), ArrowRight: () => moveDetail(1),
  ArrowUp: () => moveDetail(-1, true), ArrowDown: () => moveDetail(1, true),
};
const voteKeys = {
  ArrowLeft: () => vote(1), ArrowRight: () => vote(0), ArrowDown: () => vote(0.5), ArrowUp: skip, Backspace: undo,
};
const filmKeys = { ArrowLeft: () => stopAt(film.frame - 1), ArrowRight: () => stopAt(film.frame + 1) };
const anyKeys = {
  t: nextTheme, "?": () => (byId("help").open ? byId("help").close() : byId("help").showModal()),
  p: () => (state.view === "film" && !detail.open ? playFilm(!film.on) : play(!playing.on)),
  "[": () => setWipe(pair.at - 5), "]": () => setWipe(pair.at + 5),
};

function keysNow() {
  if (byId("help").open) return { "?": anyKeys["?"], t: nextTheme };
  if (detail.open) return { ...anyKeys, ...(pairable ? detailKeys : { ...detailKeys, s: null, w: null, b: null }) };
  return { ...anyKeys, ...gridKeys, ...(state.view === "vote" ? voteKeys : state.view === "film" ? filmKeys : {}) };
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
  if (event.target.closest("select, textarea, input:not([type=radio], [type=checkbox])")) return;
  const digit = detail.open && state.mode === "blink" && /^[1-9]$/.test(event.key) ? Number(event.key) - 1 : -1;
  const act = digit >= 0 && digit < models.length ? () => showBlink(digit, true) : keysNow()[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}
