// Rewards as numbers, intervals and lines.

const mean = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};

const shown = (v, digits) => (v === null ? "–" : v.toFixed(digits).replace("-", "−"));
const signed = (v, digits) => `${v < 0 ? "−" : "+"}${Math.abs(v).toFixed(digits)}`;
const percent = (v) => `${Math.round(100 * v)} %`;

function value(set, model, reward) {
  return set.cells[model] ? set.cells[model].rewards[reward] : null;
}

function delta(set, model, reward, base) {
  const here = value(set, model, reward);
  const there = value(set, base, reward);
  return model === base || here === null || there === null ? null : here - there;
}

/** Where bars begin and end, and how many decimals the values need. */
function scaleOf(values) {
  let low = Infinity;
  let high = -Infinity;
  let digits = 2;
  for (const v of values) {
    if (v === null) continue;
    low = Math.min(low, v);
    high = Math.max(high, v);
    if (Math.abs(v * 100 - Math.round(v * 100)) > 1e-6) digits = 3;
  }
  if (low > high) [low, high] = [0, 1];
  if (Math.max(Math.abs(low), Math.abs(high)) >= 10) digits = 2;
  if (low >= 0 && high <= 1 && high - low >= 0.25) return { low: 0, high: 1, digits };
  const room = (high - low) * 0.08 || 0.5;
  return { low: low - room, high, digits };
}

const scales = rewards.map((_, reward) => scaleOf(allSets.flatMap((set) => models.map((_, model) => value(set, model, reward)))));

/** {text, tone} of a difference: an arrow and a sign, so that colour is never the only sign. */
function change(d, digits) {
  if (d === null) return { text: "", tone: "" };
  const size = Math.abs(d).toFixed(digits);
  if (Number(size) === 0) return { text: "=", tone: "same" };
  return d > 0 ? { text: `▲ +${size}`, tone: "up" } : { text: `▼ −${size}`, tone: "down" };
}

// ---------------------------------------------------------------- intervals: prompts are the units, their seeds stay together

/** The 0.975 quantile of Student's t: a table below 4 degrees of freedom, then the expansion around the normal one (to 0.3 %). */
function student(freedom) {
  if (freedom < 4) return [Infinity, 12.706, 4.303, 3.182][freedom];
  const z = 1.959964;
  return z + (z ** 3 + z) / (4 * freedom) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * freedom ** 2)
    + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * freedom ** 3);
}

/** {mean, low, high} of one number per prompt, 95 %; without an interval below two prompts. */
function interval(values) {
  const n = values.length;
  const centre = mean(values);
  if (n < 2) return { mean: centre, low: null, high: null, n };
  const spread = Math.sqrt(values.reduce((sum, v) => sum + (v - centre) ** 2, 0) / (n - 1) / n);
  return { mean: centre, low: centre - student(n - 1) * spread, high: centre + student(n - 1) * spread, n };
}

/** Wilson's interval of a share, 95 %: honest at 0 and 1, too. n: independent trials. */
function wilson(share, n) {
  const z = 1.959964;
  const centre = (share + z * z / (2 * n)) / (1 + z * z / n);
  const half = z / (1 + z * z / n) * Math.sqrt(share * (1 - share) / n + z * z / (4 * n * n));
  return { low: Math.max(0, centre - half), high: Math.min(1, centre + half) };
}

/** The interval of a share from one share per prompt; Wilson's where all are the same, as when every prompt is won. */
function shareInterval(shares) {
  const { low, high } = interval(shares);
  if (low === null || low === high) return wilson(mean(shares), shares.length);
  return { low: Math.max(0, low), high: Math.min(1, high) };
}

/** A model against the base over these sets: mean delta and share of wins (a tie is half a one), each prompt counting once. */
function compared(sets, model, reward, base) {
  const byPrompt = new Map();
  const tally = { up: 0, down: 0, same: 0 };
  for (const set of sets) {
    const d = delta(set, model, reward, base);
    if (d === null) continue;
    const { tone } = change(d, scales[reward].digits);
    tally[tone] += 1;
    const prompt = promptOf.get(set);
    if (!byPrompt.has(prompt)) byPrompt.set(prompt, { deltas: [], wins: [] });
    byPrompt.get(prompt).deltas.push(d);
    byPrompt.get(prompt).wins.push({ up: 1, down: 0, same: 0.5 }[tone]);
  }
  const rows = [...byPrompt.values()];
  const shares = rows.map((row) => mean(row.wins));
  return {
    ...interval(rows.map((row) => mean(row.deltas))),
    tally,
    share: mean(shares),
    wins: shares.length ? shareInterval(shares) : null,
  };
}

// ---------------------------------------------------------------- lines

/** One line: label, value, change, and a bar on which the change stands out in colour. */
function rewardLine(label, scale, v, d, digits = scale.digits) {
  const { text, tone } = change(d, digits);
  const at = (x) => `${(100 * Math.min(1, Math.max(0, (x - scale.low) / (scale.high - scale.low)))).toFixed(1)}%`;
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

/** The rewards of one picture. */
function rewardList(set, model, base) {
  const list = el("ul", { className: model === base ? "rewards first" : "rewards" });
  if (!set.cells[model]) return list;
  rewards.forEach((name, reward) => {
    list.append(rewardLine(name, scales[reward], value(set, model, reward), delta(set, model, reward, base)));
  });
  return list;
}
