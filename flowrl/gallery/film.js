// Pictures over a training: the checkpoints of a run among the columns, or what the run saved as it went.
//
// A *reel* is {name, label, note, rewards: [{name, heldOut, scale}], frames: [{label, title, step}], rows(), series()}.
// rows(): [{prompt, facts, set, cells: [one per frame, or null]}]; series(): per reward the mean of every frame.

const reels = [...checkpointReels(), ...films.map(savedReel)];
const film = { frame: 0, on: false, timer: 0, drawn: null };
const FILM_BEAT = 600; // milliseconds

function checkpointReels() {
  const states = models.map((_, model) => model).filter((model) => data.models[model].run);
  const runs = Map.groupBy(states, (model) => data.models[model].run);
  const start = models.length && !data.models[0].run ? [0] : [];
  return [...runs].filter(([, own]) => own.length > 1).map(([run, own]) => {
    const columns = [...start, ...own.sort((a, b) => data.models[a].step - data.models[b].step)];
    const frames = columns.map((model) => {
      const { step } = data.models[model];
      return { label: step === undefined ? models[model] : `step ${step}`, title: models[model], step: step ?? null };
    });
    return {
      name: run,
      label: `${run}: checkpoints`,
      note: "The same prompt and seed at every checkpoint. The dashed line is the base.",
      rewards: data.rewards.map((reward, i) => ({ ...reward, scale: scales[i] })),
      frames,
      rows: () => order.map((set) => ({
        prompt: promptOf.get(set).prompt, facts: `seed ${set.seed}`, set, cells: columns.map((model) => set.cells[model]),
      })),
      series: () => rewards.map((_, reward) => columns.map((model) => mean(order.map((set) => value(set, model, reward))))),
    };
  });
}

function savedReel(saved) {
  const numbers = saved.frames.flatMap((frame) => [frame.means, ...frame.cells.map((cell) => cell.rewards)]);
  return {
    name: `${saved.name}/samples`,
    label: `${saved.name}: saved while training`,
    note: saved.note,
    rewards: saved.rewards.map((name, reward) => ({ name, heldOut: false, scale: scaleOf(numbers.map((row) => row[reward])) })),
    frames: saved.frames.map(({ step }) => ({ label: `step ${step}`, title: `step ${step}`, step })),
    rows: () => {
      const { words } = query();
      const fits = (cell) => cell && words.every((word) => folded(cell.prompt).includes(word));
      const most = Math.max(0, ...saved.frames.map((frame) => frame.cells.length));
      return Array.from({ length: most }, (_, i) => saved.frames.map((frame) => (fits(frame.cells[i]) ? frame.cells[i] : null)))
        .filter((cells) => cells.some(Boolean)).map((cells) => ({ prompt: null, facts: "", set: null, cells }));
    },
    series: () => saved.rewards.map((_, reward) => saved.frames.map((frame) => frame.means[reward])),
  };
}

const reelNow = () => reels.find((reel) => reel.name === state.film) ?? reels[0];

// ---------------------------------------------------------------- drawing

function drawFilm() {
  const reel = reelNow();
  if (!reel) return;
  film.reel = reel;
  film.rows = reel.rows();
  const stepped = reel.frames.findIndex((frame) => String(frame.step) === state.step);
  film.frame = state.step === "" || stepped < 0 ? reel.frames.length - 1 : stepped;
  byId("reel").value = reel.name;
  byId("reel").hidden = reels.length < 2;
  byId("film-note").textContent = reel.note;
  byId("frame").max = reel.frames.length - 1;
  byId("wall").checked = state.wall === "1";
  byId("charts").replaceChildren(...drawCharts(reel));
  byId("reel-rows").className = state.wall === "1" ? "wall" : "strips";
  byId("reel-rows").replaceChildren(...(state.wall === "1" ? drawWall() : drawStrips(reel)));
  showFrame(film.frame);
}

/** Rows of frames from left to right; one scroller for all, so that a step stands in one column. */
function drawStrips(reel) {
  byId("reel-rows").style.setProperty("--frames", reel.frames.length);
  const labelled = film.rows.some((row) => row.prompt !== null);
  byId("reel-rows").classList.toggle("labelled", labelled);
  const words = (...content) => (labelled ? [el("div", { className: "strip-words" }, ...content)] : []);
  const step = ({ title, label }, i) =>
    el("button", { type: "button", className: "step", title, onclick: () => stopAt(i) }, label);
  const head = el("div", { className: "strip strip-head" }, ...words(), ...reel.frames.map(step));
  return [head, ...film.rows.map((row) => {
    const title = words(el("h2", { dir: "auto" }, row.prompt ?? ""), el("p", { className: "facts" }, row.facts));
    const shots = row.cells.map((cell, i) => drawFrame(row, cell, reel.frames[i].label));
    return el("section", { className: "strip" }, ...title, ...shots);
  })];
}

function drawFrame(row, cell, label) {
  if (!cell) return el("span", { className: "shot" });
  const prompt = row.prompt ?? cell.prompt;
  const shot = el("figure", { className: "shot" }, openable(row, cell, picture(cell, `${label}: ${prompt}`)));
  if (row.prompt === null) shot.append(el("p", { className: "shot-prompt", dir: "auto", title: prompt }, prompt));
  shot.append(shotRewards(cell));
  return shot;
}

/** A link to the detail view of a set, or to the original where there is no set. */
function openable(row, cell, content) {
  if (row.set) return el("button", { type: "button", className: "picture", onclick: () => openDetail(row.set) }, content);
  if (!cell.image) return content;
  return el("a", { className: "picture", href: cell.image, target: "_blank", title: "Open the original" }, content);
}

function shotRewards(cell) {
  const numbers = film.reel.rewards.map(({ name, scale }, i) =>
    el("span", { title: name }, el("span", { className: "name" }, name), shown(cell.rewards[i] ?? null, scale.digits)));
  return el("p", { className: "shot-rewards" }, ...numbers);
}

/** One tile per row with all its frames in one place, one of them seen. */
function drawWall() {
  return film.rows.map((row) => {
    const layers = row.cells.map((cell, i) => {
      const label = film.reel.frames[i].label;
      const layer = cell ? picture(cell, `${label}: ${row.prompt ?? cell.prompt}`) : placeholder("No picture");
      layer.classList.add("layer");
      return layer;
    });
    const box = el("span", { className: "pair layers" }, ...layers);
    const first = row.cells.find((cell) => cell?.width);
    if (first) box.style.aspectRatio = `${first.width} / ${first.height}`;
    const content = row.set ? openable(row, first, box) : box;
    const tile = el("figure", { className: "tile" }, content, el("p", { className: "shot-prompt", dir: "auto" }), el("p"));
    tile.row = row;
    return tile;
  });
}

function turnTile(tile, frame) {
  const { row, children: [, words] } = tile;
  const cell = row.cells[frame];
  tile.querySelectorAll(".layer").forEach((layer, i) => layer.classList.toggle("on", i === frame));
  words.textContent = [row.prompt ?? cell?.prompt ?? "", row.facts].filter(Boolean).join(" · ");
  tile.lastChild.replaceWith(cell ? shotRewards(cell) : el("p", { className: "shot-rewards" }));
}

// ---------------------------------------------------------------- charts

const CHART = { width: 260, height: 76, left: 4, right: 4, top: 6, bottom: 6 };

function drawCharts(reel) {
  const steps = reel.frames.map((frame) => frame.step).filter((step) => step !== null);
  const [first, final] = [Math.min(...steps), Math.max(...steps)];
  const along = (step) => (final > first ? (step - first) / (final - first) : 0.5);
  const x = (step) => CHART.left + (CHART.width - CHART.left - CHART.right) * along(step);
  film.x = x;
  return reel.series().map((means, reward) => drawChart(reel, means, reward, x));
}

function drawChart(reel, means, reward, x) {
  const { name, heldOut, scale } = reel.rewards[reward];
  const known = means.filter((v) => v !== null);
  const range = known.length ? `${shown(Math.min(...known), 3)} to ${shown(Math.max(...known), 3)}` : "–";
  const number = el("output", { className: "chart-value" });
  const marks = heldOut ? [el("span", { className: "mark" }, "held out")] : [];
  const caption = el("figcaption", {}, el("span", {}, name), ...marks, el("span", { className: "range" }, range), number);
  const drawing = drawCurve(reel, means, x);
  drawing.setAttribute("aria-label", `${name} over the training: ${range}`);
  drawing.addEventListener("click", (event) => stopAt(nearestFrame(reel, event, drawing)));
  const node = el("figure", { className: "chart" }, caption, drawing);
  node.show = (frame) => { number.textContent = shown(means[frame], Math.max(3, scale.digits)); };
  return node;
}

function drawCurve(reel, means, x) {
  const known = means.filter((v) => v !== null);
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (!known.length) [low, high] = [0, 1];
  if (high === low) [low, high] = [low - 0.5, high + 0.5];
  const y = (v) => CHART.top + (CHART.height - CHART.top - CHART.bottom) * (high - v) / (high - low);
  const points = reel.frames.map((frame, i) => [frame.step, means[i], i]).filter(([step, v]) => step !== null && v !== null);
  const line = points.map(([step, v]) => `${x(step).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
  const marks = points.map(([step, v, i]) => svg("circle", { cx: x(step), cy: y(v), r: 2.5, "data-frame": i }));
  const base = reel.frames[0].step === null && means[0] !== null
    ? [svg("line", { class: "chart-base", x1: 0, x2: CHART.width, y1: y(means[0]), y2: y(means[0]) })] : [];
  const now = svg("line", { class: "chart-now", x1: 0, x2: 0, y1: 0, y2: CHART.height });
  const viewBox = `0 0 ${CHART.width} ${CHART.height}`;
  return svg("svg", { viewBox, role: "img" }, ...base, now, svg("polyline", { points: line }), ...marks);
}

function nearestFrame(reel, event, drawing) {
  const { left, width } = drawing.getBoundingClientRect();
  const at = CHART.width * (event.clientX - left) / width;
  const far = (frame) => (frame.step === null ? Infinity : Math.abs(film.x(frame.step) - at));
  return reel.frames.reduce((best, frame, i) => (far(frame) < far(reel.frames[best]) ? i : best), 0);
}

// ---------------------------------------------------------------- the frame that is shown

function showFrame(frame) {
  film.frame = frame;
  const { label, step } = film.reel.frames[frame];
  byId("frame").value = frame;
  byId("frame-label").textContent = `${label} · ${frame + 1} of ${film.reel.frames.length}`;
  for (const chart of byId("charts").children) {
    chart.show(frame);
    const line = chart.querySelector(".chart-now");
    line.style.display = step === null ? "none" : "";
    if (step !== null) line.setAttribute("transform", `translate(${film.x(step)} 0)`);
    chart.querySelectorAll("circle").forEach((mark) => mark.classList.toggle("now", Number(mark.dataset.frame) === frame));
  }
  if (state.wall === "1") for (const tile of byId("reel-rows").children) turnTile(tile, frame);
  else markColumn(frame);
}

function markColumn(frame) {
  const area = byId("reel-rows");
  area.querySelectorAll(".now").forEach((node) => node.classList.remove("now"));
  for (const strip of area.children) strip.children[strip.children.length - film.reel.frames.length + frame].classList.add("now");
  const head = area.firstChild.querySelector(".now");
  const words = area.firstChild.querySelector(".strip-words")?.offsetWidth ?? 0;
  const [left, right] = [head.offsetLeft - words, head.offsetLeft + head.offsetWidth];
  if (left < area.scrollLeft) area.scrollLeft = left;
  else if (right > area.scrollLeft + area.clientWidth) area.scrollLeft = right - area.clientWidth;
}

/** Go to a frame and stay there. */
function stopAt(frame) {
  playFilm(false);
  const { frames } = film.reel;
  const target = Math.min(frames.length - 1, Math.max(0, frame));
  state.step = target === frames.length - 1 ? "" : String(frames[target].step);
  writeHash();
  showFrame(target);
}

function playFilm(on) {
  clearInterval(film.timer);
  film.on = on;
  byId("roll").textContent = on ? "Pause" : "Play";
  if (on) film.timer = setInterval(() => showFrame((film.frame + 1) % film.reel.frames.length), FILM_BEAT);
}

function wireFilm() {
  byId("reel").append(...options(reels.map((reel) => ({ value: reel.name, label: reel.label }))));
  byId("reel").onchange = (event) => update({ film: event.target.value, step: "" });
  byId("wall").onchange = (event) => update({ wall: event.target.checked ? "1" : "" });
  byId("frame").oninput = (event) => stopAt(Number(event.target.value));
  byId("roll").onclick = () => playFilm(!film.on);
}
