// The head: facts, what could not be read, tables, means with intervals.

function drawHead() {
  byId("title").textContent = data.title;
  byId("subtitle").textContent = data.subtitle;
  byId("subtitle").hidden = !data.subtitle;
  const pictures = allSets.reduce((n, set) => n + set.cells.filter((cell) => cell?.image).length, 0);
  const inFilms = films.reduce((n, film) => n + film.frames.reduce((m, frame) => m + frame.cells.length, 0), 0);
  const facts = [];
  if (prompts.length) facts.push(count(models.length, "model"), count(prompts.length, "prompt"), count(pictures, "picture"));
  if (inFilms) facts.push(`${count(films.length, "film")} of ${count(inFilms, "picture")}`);
  byId("facts").textContent = facts.join(" · ");
}

function drawProblems() {
  byId("problems").hidden = !data.problems.length;
  if (!data.problems.length) return;
  const lines = data.problems.slice(0, 200).map((text) => el("li", { dir: "auto" }, text));
  if (data.problems.length > 200) lines.push(el("li", {}, `and ${data.problems.length - 200} more`));
  const head = `${count(data.problems.length, "problem")} while the gallery was made`;
  byId("problems").append(el("summary", {}, head), el("ul", {}, ...lines));
}

function drawTables() {
  byId("tables").hidden = !data.tables.length;
  byId("tables-title").textContent = count(data.tables.length, "table");
  const numeric = /^[▲▼=+−<>~≈±\s-]*\d(?: to |[\d\s.,%±+−×x()[\]▲▼–-])*$|^[–-]?$/;
  for (const table of data.tables) {
    const side = table.header.map((_, i) => (i && table.rows.every((row) => numeric.test(row[i])) ? "number" : ""));
    const toneOf = (text) => ({ "▲": " up", "▼": " down" })[text[0]] ?? "";
    const cell = (tag) => (text, i) => el(tag, { className: side[i] + toneOf(text), dir: "auto" }, text);
    const line = (tag, row) => el("tr", {}, ...row.map(cell(tag)));
    const scroller = el("div", { className: "scroller", tabIndex: 0, role: "group", "aria-label": table.title },
      el("table", {},
        el("thead", {}, line("th", table.header)),
        el("tbody", {}, ...table.rows.map((row) => line("td", row)))));
    byId("tables-all").append(el("section", { className: "card" }, el("h2", {}, table.title), scroller));
  }
}

// ---------------------------------------------------------------- means over the pictures shown

let summarised = ""; // what the cards are of, so that an order alone does not draw them again

/** One card per reward: every model's mean over the pictures shown, and how it does against the base. */
function drawSummary() {
  const shownSets = new Set(order);
  const key = [state.base, ...allSets.map((set) => (shownSets.has(set) ? "1" : "0"))].join("");
  if (key === summarised) return;
  summarised = key;
  const results = rewards.map((_, reward) => models.map((_name, model) => compared(order, model, reward, baseIndex())));
  byId("cards").replaceChildren(...rewards.map((name, reward) => drawCard(name, reward, results[reward])));
  drawAlarms(results);
}

function drawCard(name, reward, results) {
  const lines = models.map((model, index) => {
    const average = mean(order.map((set) => value(set, index, reward)));
    const line = rewardLine(model, scales[reward], average, index === baseIndex() ? null : results[index].mean, 3);
    const tells = index !== baseIndex() && results[index].mean !== null;
    if (tells) line.append(el("span", { className: "tally" }, ...against(results[index])));
    return line;
  });
  const { low, high } = scales[reward];
  const marks = data.rewards[reward].heldOut ? [el("span", { className: "mark" }, "held out")] : [];
  const head = el("h2", {}, el("span", {}, name), ...marks,
    el("span", { className: "range", title: "Where the bars begin and end" }, `${shown(low, 2)} to ${shown(high, 2)}`));
  return el("section", { className: "card" }, head, el("ul", { className: pairable ? "rewards" : "rewards first" }, ...lines));
}

/** "+0.03 to +0.10 · wins 64 % (55 to 72 %) · 12 better, 3 worse, 9 equal" */
function against({ low, high, share, wins, tally }) {
  const parts = [];
  if (low !== null) parts.push(`change ${signed(low, 3)} to ${signed(high, 3)}`);
  if (wins) parts.push(`wins ${percent(share)} (${Math.round(100 * wins.low)} to ${percent(wins.high)})`);
  parts.push(`${tally.up} better, ${tally.down} worse, ${tally.same} equal`);
  return parts.map((text) => el("span", {}, text));
}

/** A trained reward that surely rises while a held-out one surely falls: said in words. */
function drawAlarms(results) {
  const alarms = models.flatMap((model, index) => {
    const sure = (heldOut, sign) => rewards.map((_, reward) => reward).filter((reward) =>
      data.rewards[reward].heldOut === heldOut && sign * (results[reward][index][sign > 0 ? "low" : "high"] ?? 0) > 0);
    const [up, down] = [sure(false, 1), sure(true, -1)];
    if (!held || !up.length || !down.length) return [];
    const named = (list) => list.map((reward) => `${rewards[reward]} ${signed(results[reward][index].mean, 3)}`).join(", ");
    return [el("p", {}, el("b", {}, model), `: trained ${named(up)}, held out ${named(down)}, both beyond their intervals. `,
      el("button", { type: "button", onclick: () => update({ sort: "suspects", model }) }, "Show the suspects"))];
  });
  byId("alarms").hidden = !alarms.length;
  byId("alarms").replaceChildren(...alarms);
}

function drawLegend() {
  const against = `Changes compare the same prompt and seed with the base: ▲ better, ▼ worse, = equal. Intervals hold 95 %:
    each prompt counts once, with the mean of its seeds (Student's t); a tie is half a win. `;
  byId("legend").append(
    el("p", {}, pairable ? against : "", "A dash means that the reward abstains. Means are over the pictures shown."),
    el("p", {}, "The address is a link to what you see. ? lists the keys."));
}
