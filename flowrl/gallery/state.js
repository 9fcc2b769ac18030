// What the page shows: the state, mirrored in location.hash, and the sets that it selects.

const VIEWS = ["grid", "wipe", "blink", "film", "vote"];
const MODES = ["side", "wipe", "blink"];
const pairable = last > 0;
const held = data.rewards.some((reward) => reward.heldOut);

const defaults = {
  view: "grid", q: "", kind: "", only: "", sort: "", base: models[0] ?? "", model: models[last] ?? "", size: "m",
  open: "", mode: "side", film: "", step: "", wall: "", contest: "",
};
let state = { ...defaults };

const has = {
  grid: () => allSets.length > 0,
  wipe: () => pairable && allSets.length > 0,
  blink: () => pairable && allSets.length > 0,
  film: () => reels.length > 0,
  vote: () => contests.length > 0,
};

/** A state whose every value is one that there is: links may come from another gallery. */
function checked(given) {
  const known = { ...defaults, ...given };
  const among = (name, values) => { if (!values.includes(known[name])) known[name] = defaults[name]; };
  among("view", VIEWS.filter((view) => has[view]()));
  among("base", models);
  among("model", models);
  if (known.model === known.base && pairable) known.model = models.findLast((name) => name !== known.base);
  among("sort", sortChoices().map((choice) => choice.value));
  among("only", onlyChoices().map((choice) => choice.value));
  among("kind", kinds);
  among("size", ["s", "m", "l"]);
  among("mode", pairable ? MODES : ["side"]);
  among("film", reels.map((reel) => reel.name));
  among("contest", contests.map((contest) => contest.value));
  if (!has[known.view]()) known.view = VIEWS.find((view) => has[view]()) ?? "grid";
  return known;
}

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = checked(Object.fromEntries([...given].filter(([name]) => name in defaults)));
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

const baseIndex = () => models.indexOf(state.base);
const modelIndex = () => models.indexOf(state.model);

// ---------------------------------------------------------------- orders and filters

/** How far the trained rewards rise while the held-out ones fall, in shares of their ranges; null where they do not. */
function suspicion(set, model, _, base) {
  const moved = (heldOut) => mean(rewards.map((_name, reward) => {
    const d = data.rewards[reward].heldOut === heldOut ? delta(set, model, reward, base) : null;
    return d === null ? null : d / (scales[reward].high - scales[reward].low);
  }));
  const [trained, others] = [moved(false), moved(true)];
  return trained > 0 && others !== null && others < 0 ? trained - others : null;
}

/** The orders on offer: {value: REWARD:WHAT, label, group, reward, of, sign}; sign 1 puts the smallest first. */
function sortChoices() {
  const choices = [{ value: "", label: "Prompt order" }];
  if (pairable && held) {
    choices.push({ value: "suspects", label: "Hacking suspects first", of: suspicion, sign: -1 });
  }
  rewards.forEach((group, reward) => {
    if (pairable) {
      choices.push({ value: `${group}:loss`, label: `${group}: worst regressions first`, group, reward, of: delta, sign: 1 });
      choices.push({ value: `${group}:gain`, label: `${group}: largest gains first`, group, reward, of: delta, sign: -1 });
    }
    choices.push({ value: `${group}:low`, label: `${group}: lowest first`, group, reward, of: value, sign: 1 });
    choices.push({ value: `${group}:high`, label: `${group}: highest first`, group, reward, of: value, sign: -1 });
  });
  return choices;
}

function onlyChoices() {
  const choices = [{ value: "", label: "All pictures" }];
  if (!pairable || !rewards.length) return choices;
  choices.push({ value: "changed", label: "Only changed" });
  rewards.forEach((group) => {
    for (const [what, word] of [["down", "worse"], ["up", "better"], ["same", "unchanged"]]) {
      choices.push({ value: `${group}:${what}`, label: `${group}: ${word}`, group });
    }
  });
  return choices;
}

function tone(set, model, reward, base) {
  return change(delta(set, model, reward, base), scales[reward].digits).tone;
}

function changed(set, base) {
  return models.some((_, model) => rewards.some((_name, reward) => {
    const one = value(set, model, reward);
    const other = value(set, base, reward);
    return one === null || other === null ? one !== other : !["same", ""].includes(tone(set, model, reward, base));
  }));
}

/** The filter of the second select, as a test of a set. */
function onlyTest() {
  const [base, model] = [baseIndex(), modelIndex()];
  if (!state.only || state.view === "vote") return null; // a vote knows nothing of rewards
  if (state.only === "changed") return (set) => changed(set, base);
  const cut = state.only.lastIndexOf(":");
  const reward = rewards.indexOf(state.only.slice(0, cut));
  return (set) => tone(set, model, reward, base) === state.only.slice(cut + 1);
}

const TESTS = {
  "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
  "=": (a, b) => Math.abs(a - b) < 1e-9,
};

/** A condition like tiny_strict<0.5, of the model's value, or Δtiny_strict<0, of its delta; null for any other word. */
function condition(word) {
  const found = /^(Δ|delta\.)?(.+?)(<=|>=|<|>|=)([-+−]?[\d.]+)$/iu.exec(word);
  const reward = found ? rewards.findIndex((name) => folded(name) === found[2]) : -1;
  const bound = found ? Number(found[4].replace("−", "-")) : NaN;
  if (reward < 0 || Number.isNaN(bound)) return null;
  const of = found[1] ? delta : value;
  return (set) => {
    const v = of(set, modelIndex(), reward, baseIndex());
    return v !== null && TESTS[found[3]](v, bound);
  };
}

const haystack = new Map(prompts.map((prompt) => [prompt, folded(prompt.prompt)]));

/** The search field: words that the prompt contains, and conditions. */
function query() {
  const parts = folded(state.q).split(/\s+/).filter(Boolean).map((word) => [word, condition(word)]);
  return {
    words: parts.filter(([, test]) => !test).map(([word]) => word),
    tests: parts.map(([, test]) => test).filter(Boolean),
  };
}

/** [{prompt, sets, key, by}] after filter and order: a prompt stands where its first seed would; abstentions come last. */
function selection() {
  const { words, tests } = query();
  const by = sortChoices().find((choice) => choice.value === state.sort);
  const only = onlyTest();
  if (only) tests.push(only);
  const keyOf = (set) => (by.of ? by.of(set, modelIndex(), by.reward, baseIndex()) : null);
  const compare = (a, b) => (a === null || b === null ? (a === null) - (b === null) : by.sign * (a - b));
  const chosen = [];
  for (const prompt of prompts) {
    if (state.kind && prompt.kind !== state.kind) continue;
    if (!words.every((word) => haystack.get(prompt).includes(word))) continue;
    const sets = prompt.sets.filter((set) => tests.every((test) => test(set)));
    if (!sets.length) continue;
    if (by.of) sets.sort((a, b) => compare(keyOf(a), keyOf(b)));
    chosen.push({ prompt, sets, key: keyOf(sets[0]), by });
  }
  return by.of ? chosen.sort((a, b) => compare(a.key, b.key)) : chosen;
}
