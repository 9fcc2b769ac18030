// The blind vote: two pictures of one prompt, sides by chance, no names, no rewards; what was preferred is kept in the browser
// and written as preference pairs that `flowrl train` and `flowrl train-reward` read.
//
// A *duel* is {key, prompt, cells: [two], models: [two], sets: [two], swapped}: in its own order; swapped: the page turns it.

const contests = contestChoices();
const VOTES = `flowrl-votes-${data.id}`;
const ballot = loadVotes(); // {salt, votes: {key: preference for the duel's first picture, a tie is 0.5}, trail: [keys]}
let duels = []; // those of this contest and selection, in the order in which they come
let duel = null;
let skipped = new Set();

function contestChoices() {
  const choices = [];
  if (last > 0) choices.push({ value: "", label: "Two models, same seed" });
  if (last > 1) choices.push({ value: "all", label: "All pairs of models, same seed" });
  const seeds = prompts.some((prompt) => prompt.sets.length > 1);
  if (seeds) choices.push({ value: last > 0 ? "seeds" : "", label: "Two seeds of one model" });
  return choices;
}

function loadVotes() {
  const fresh = { salt: Math.floor(Math.random() * 2 ** 31), votes: {}, trail: [] };
  try {
    return { ...fresh, ...JSON.parse(store.get(VOTES) ?? "{}") };
  } catch {
    return fresh;
  }
}

function saveVotes() {
  store.set(VOTES, JSON.stringify(ballot));
}

/** A number below 2^32 from text and the salt of this browser: orders and sides that nobody chose and that stay. */
function chance(text) {
  let hash = 2166136261 ^ ballot.salt;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 16777619);
  hash = Math.imul(hash ^ (hash >>> 15), 2246822519);
  return (hash ^ (hash >>> 13)) >>> 0;
}

// ---------------------------------------------------------------- which pictures meet

function duelOf(prompt, a, b) {
  const sides = [a, b];
  if (!sides.every(([set, model]) => set.cells[model]?.image)) return null;
  const key = [prompt.id, ...sides.map(([set, model]) => `${set.seed}.${model}`)].join("|");
  return {
    key, prompt, swapped: (chance(`side ${key}`) & 1) === 1, models: sides.map(([, model]) => model),
    sets: sides.map(([set]) => set), cells: sides.map(([set, model]) => set.cells[model]),
  };
}

/** Pairs of models within a set. */
function modelPairs() {
  if (state.contest !== "all") return [[baseIndex(), modelIndex()].sort((a, b) => a - b)];
  return models.flatMap((_, a) => models.slice(a + 1).map((_name, b) => [a, a + 1 + b]));
}

function duelsOf({ prompt, sets }) {
  if (last > 0 && state.contest !== "seeds") {
    return sets.flatMap((set) => modelPairs().map(([a, b]) => duelOf(prompt, [set, a], [set, b])));
  }
  const sorted = prompt.sets.filter((set) => sets.includes(set)); // a pair has one order, whatever the page's
  const model = modelIndex();
  return sorted.flatMap((a, i) => sorted.slice(i + 1).map((b) => duelOf(prompt, [a, model], [b, model])));
}

/** The duel of a key, whatever the page shows now; null where its pictures are not in this gallery. */
function duelNamed(key) {
  const [id, a, b] = key.split("|");
  const prompt = prompts.find((candidate) => candidate.id === id);
  const side = (text) => {
    const cut = text?.lastIndexOf(".") ?? -1;
    const set = prompt?.sets.find((candidate) => String(candidate.seed) === text.slice(0, cut));
    return set ? [set, Number(text.slice(cut + 1))] : null;
  };
  const sides = prompt ? [side(a), side(b)] : [null];
  return sides.every(Boolean) ? duelOf(prompt, ...sides) : null;
}

// ---------------------------------------------------------------- voting

function drawVote(chosen) {
  duels = chosen.flatMap(duelsOf).filter(Boolean).sort((a, b) => chance(a.key) - chance(b.key));
  byId("contest").value = state.contest;
  byId("contest").hidden = contests.length < 2;
  skipped = new Set([...skipped].filter((key) => duels.some((candidate) => candidate.key === key)));
  nextDuel();
}

function nextDuel() {
  const left = duels.filter((candidate) => !(candidate.key in ballot.votes));
  const [next, then] = left.filter((candidate) => !skipped.has(candidate.key));
  showDuel(next ?? null, left.length);
  for (const cell of then?.cells ?? []) if (!cell.video) new Image().src = cell.image; // there before it is asked for
}

function showDuel(next, left) {
  duel = next;
  const done = duels.length - left;
  byId("vote-progress").textContent = `${done} of ${count(duels.length, "pair")}`;
  byId("vote-bar").max = Math.max(1, duels.length);
  byId("vote-bar").value = done;
  byId("duel").hidden = !duel;
  byId("vote-done").hidden = Boolean(duel);
  byId("vote-done").textContent = !duels.length ? "No pair of pictures here: show more prompts, or compare something else."
    : left ? `${count(left, "pair")} left out. ` : "All pairs are decided.";
  if (left && !duel) byId("vote-done").append(el("button", { type: "button", onclick: unskip }, "Show them again"));
  byId("vote-prompt").textContent = duel ? duel.prompt.prompt : "";
  byId("undo").disabled = !ballot.trail.length;
  if (duel) {
    const [first, second] = duel.swapped ? [1, 0] : [0, 1];
    byId("left").replaceChildren(picture(duel.cells[first], "Left picture", { lazy: false, original: true }));
    byId("right").replaceChildren(picture(duel.cells[second], "Right picture", { lazy: false, original: true }));
  }
  drawBallot();
}

function unskip() {
  skipped.clear();
  nextDuel();
}

/** left: 1 where the left picture is better, 0 where the right one is, 0.5 for a tie. */
function vote(left) {
  if (!duel) return;
  ballot.votes[duel.key] = duel.swapped ? 1 - left : left;
  ballot.trail.push(duel.key);
  saveVotes();
  nextDuel();
}

function skip() {
  if (!duel) return;
  skipped.add(duel.key);
  nextDuel();
}

function undo() {
  const key = ballot.trail.pop();
  if (!key) return;
  delete ballot.votes[key];
  saveVotes();
  skipped.delete(key);
  const left = duels.filter((candidate) => !(candidate.key in ballot.votes));
  showDuel(left.find((candidate) => candidate.key === key) ?? left[0] ?? null, left.length);
}

function clearVotes() {
  if (!confirm(`Forget all ${count(Object.keys(ballot.votes).length, "vote")} of this gallery?`)) return;
  ballot.votes = {};
  ballot.trail = [];
  saveVotes();
  nextDuel();
}

// ---------------------------------------------------------------- what the votes say

function decided() {
  return Object.entries(ballot.votes).map(([key, label]) => ({ ...duelNamed(key), label })).filter((entry) => entry.key);
}

function drawBallot() {
  const entries = decided();
  const ties = entries.filter((entry) => entry.label === 0.5).length;
  const all = count(entries.length, "vote") + (ties ? `, ${count(ties, "tie")} among them` : "");
  const lost = "This browser keeps nothing for this page: download before you close it.";
  const where = store.lasts ? "They stay in this browser." : lost;
  byId("vote-count").textContent = entries.length ? `${all}. ${where}` : "No votes yet.";
  byId("download").disabled = !entries.length;
  byId("forget").disabled = !entries.length;
  byId("results").hidden = !entries.length;
  byId("results-body").replaceChildren(...(byId("results").open ? results(entries) : []));
  drawCommands(entries);
}

function results(entries) {
  const table = (title, head, lines) => el("div", {}, el("h3", {}, title), el("div", { className: "scroller" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", {}, text)))),
    el("tbody", {}, ...lines.map((line) => el("tr", {}, ...line.map((text) => el("td", { dir: "auto" }, text))))))));
  const share = (rate, n) => {
    const { low, high } = wilson(rate, n);
    return `${percent(rate)} (${Math.round(100 * low)} to ${percent(high)})`;
  };
  const found = [];
  const meetings = Map.groupBy(entries.filter(({ models: [a, b] }) => a !== b), (entry) => entry.models.join());
  const wins = [...meetings.values()].map((met) => {
    const [a, b] = met[0].models;
    const rate = 1 - mean(met.map((entry) => entry.label));
    return [`${models[b]} against ${models[a]}`, share(rate, met.length), String(met.length)];
  });
  if (wins.length) found.push(table("Wins", ["", "wins (a tie is half a one), 95 %", "votes"], wins));
  const agreement = rewards.flatMap((name, reward) => {
    const told = entries.map(({ label, cells: [a, b] }) => [label, a.rewards[reward], b.rewards[reward]])
      .filter(([label, a, b]) => label !== 0.5 && a !== null && b !== null && a !== b)
      .map(([label, a, b]) => Number((a > b) === (label === 1)));
    return told.length ? [[name, share(mean(told), told.length), String(told.length)]] : [];
  });
  const head = ["", "agrees, 95 %", "votes it decides"];
  if (agreement.length) found.push(table("Rewards that agree with the votes", head, agreement));
  return found.length ? found : [el("p", {}, "Nothing to count yet.")];
}

// ---------------------------------------------------------------- preference pairs

/** The gallery's folder on this machine's disk, with a slash at its end; null where the page comes from elsewhere. */
function folderOnDisk() {
  if (location.protocol !== "file:") return null;
  try {
    const path = decodeURIComponent(location.pathname.replace(/[^/]*$/, ""));
    return /^\/[A-Za-z]:\//.test(path) ? path.slice(1) : path;
  } catch {
    return null;
  }
}

const absolute = () => folderOnDisk() !== null && byId("paths").value === "absolute";
const votesFile = () => `votes-${(folderOnDisk() ?? "gallery/").split("/").at(-2).replace(/[^A-Za-z0-9._-]+/g, "-")}.jsonl`;

/** A line of JSON for each vote: image_0, image_1 and label_0, the probability that the first is preferred. */
function pairLines(entries) {
  const folder = absolute() ? folderOnDisk() : "";
  return entries.map(({ prompt, cells, sets, models: [a, b], label }) => JSON.stringify({
    prompt: prompt.prompt, image_0: folder + cells[0].image, image_1: folder + cells[1].image, label_0: label,
    ...(prompt.kind === null ? {} : { kind: prompt.kind }),
    model_0: models[a], model_1: models[b], seed_0: sets[0].seed, seed_1: sets[1].seed,
    rewards_0: named(cells[0]), rewards_1: named(cells[1]),
  })).join("\n") + "\n";
}

function named(cell) {
  return Object.fromEntries(rewards.map((name, reward) => [name, cell.rewards[reward]]));
}

function download() {
  const url = URL.createObjectURL(new Blob([pairLines(decided())], { type: "application/jsonl" }));
  el("a", { href: url, download: votesFile() }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function drawCommands(entries) {
  const folder = folderOnDisk();
  const file = absolute() || folder === null ? votesFile() : folder + votesFile();
  const quoted = /^[\w./@:+-]+$/.test(file) ? file : `'${file.replaceAll("'", "'\\''")}'`;
  const strict = Math.max(1, entries.filter((entry) => entry.label !== 0.5).length);
  const size = strict < 48 ? ` prompts_per_step=${strict} batch_size=${2 * strict}` : "";
  const home = folder === null ? ", beside index.html" : ` (${folder})`;
  byId("paths-note").textContent = absolute()
    ? "The file names the pictures by their full paths: it can lie anywhere on this machine."
    : `Save the file in the gallery's folder${home}: it names the pictures relative to itself.`;
  byId("command-train").textContent = `flowrl train tiny-dpo-offline data=${quoted} output_dir=runs/voted${size}`;
  byId("command-reward").textContent = `flowrl train-reward tiny-preference task.data=${quoted} output_dir=runs/voted_reward`;
}

function wireVote() {
  byId("contest").append(...options(contests));
  byId("contest").onchange = (event) => update({ contest: event.target.value });
  byId("left").onclick = () => vote(1);
  byId("right").onclick = () => vote(0);
  byId("tie").onclick = () => vote(0.5);
  byId("skip").onclick = skip;
  byId("undo").onclick = undo;
  byId("download").onclick = download;
  byId("forget").onclick = clearVotes;
  byId("paths").hidden = folderOnDisk() === null;
  byId("paths").onchange = drawBallot;
  byId("results").ontoggle = drawBallot;
  for (const id of ["command-train", "command-reward"]) byId(id).before(copyButton(() => byId(id).textContent));
}
