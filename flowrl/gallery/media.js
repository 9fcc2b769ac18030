// Pictures, clips and their common beat.

const playing = { on: true, started: 0, at: 0, timer: 0 }; // at: milliseconds into the clips when they were paused
const clips = new Set(); // {show(ms), length()} of the clips near the window

function placeholder(text) {
  return el("span", { className: "placeholder" }, text);
}

/** A box of the picture's own shape with the picture, the clip or the film in it, or a label where there is none. */
function picture(cell, alt, { lazy = true, original = false } = {}) {
  if (!cell) return placeholder("No picture");
  if (!cell.image) return placeholder(cell.note);
  if (cell.video) return videoBox(cell, alt);
  if (cell.frames) return clipBox(cell, alt, lazy);
  const file = original ? cell.image : cell.thumb || cell.image;
  const image = el("img", { alt, width: cell.width, height: cell.height, decoding: "async", draggable: false });
  if (Math.max(cell.width, cell.height) <= 128) image.className = "tiny";
  image.style.aspectRatio = `${cell.width} / ${cell.height}`;
  image.onerror = () => lose(image, file);
  if (lazy) image.loading = "lazy";
  image.src = file;
  return image;
}

function lose(node, file) {
  const label = placeholder(`Missing file: ${file.split("/").pop()}`);
  label.classList.add(...["over", "under", "layer", "on"].filter((name) => node.classList.contains(name)));
  node.replaceWith(label);
}

// ---------------------------------------------------------------- clips: frames in one picture, moved behind a window

function clipBox(cell, alt, lazy) {
  const { file, count: frames, columns, ms } = cell.frames;
  const lines = Math.ceil(frames / columns);
  const image = el("img", { alt, decoding: "async", draggable: false });
  image.style.width = `${100 * columns}%`;
  image.style.height = `${100 * lines}%`;
  const box = el("span", { className: `clip${Math.max(cell.width, cell.height) <= 128 ? " tiny" : ""}` }, image);
  box.style.aspectRatio = `${cell.width} / ${cell.height}`;
  image.onerror = () => lose(box, file);
  if (lazy) image.loading = "lazy";
  image.src = file;
  let now = -1;
  watchClip(box, {
    length: () => frames * ms,
    show(time) {
      const frame = Math.min(frames - 1, Math.floor(time / ms));
      if (frame === now) return;
      now = frame;
      image.style.transform = `translate(${-100 * (frame % columns) / columns}%, ${-100 * Math.floor(frame / columns) / lines}%)`;
    },
  });
  return box;
}

function videoBox(cell, alt) {
  const video = el("video", { muted: true, playsInline: true, preload: "auto", "aria-label": alt, src: cell.image });
  const known = () => Number.isFinite(video.duration);
  video.onerror = () => lose(video, cell.image);
  video.onloadedmetadata = () => {
    video.loop = !known(); // a recording without a length keeps its own time
    video.classList.toggle("tiny", Math.max(video.videoWidth, video.videoHeight) <= 128);
  };
  watchClip(video, {
    length: () => (known() ? 1000 * video.duration : 0),
    show(time) {
      const at = Math.min(time / 1000, video.duration - 0.01);
      if (playing.on && video.paused && !video.ended) video.play().catch(() => {});
      if (!playing.on && !video.paused) video.pause();
      const late = Math.abs(video.currentTime - at) > (playing.on ? 0.15 : 0.02);
      if (known() && late && !(playing.on && video.seeking)) video.currentTime = at; // paused, there is no later call
    },
  });
  return video;
}

// ---------------------------------------------------------------- the beat

const nearby = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) clips.add(target.clip);
    else {
      clips.delete(target.clip);
      target.pause?.();
    }
  }
  if (clips.size) beat();
}, { rootMargin: "200px" });

function watchClip(node, clip) {
  node.clip = clip;
  nearby.observe(node);
}

const period = () => Math.max(1, ...[...clips].map((clip) => clip.length()));
const clock = () => (playing.on ? performance.now() - playing.started : playing.at);

/** Every clip shows what it has now; the longest decides when all begin again, shorter ones wait on their last frame. */
function beat() {
  cancelAnimationFrame(playing.timer);
  const now = clock() % period();
  for (const clip of clips) clip.show(now);
  byId("time").value = Math.round(1000 * now / period());
  if (playing.on && clips.size) playing.timer = requestAnimationFrame(beat);
}

function play(on) {
  playing.at = clock() % period();
  playing.started = performance.now() - playing.at;
  playing.on = on;
  byId("play").textContent = on ? "Pause" : "Play";
  byId("play").setAttribute("aria-pressed", String(!on));
  beat();
}

/** Stop at a share of the clips' length, 0 to 1. */
function seek(share) {
  playing.on = false;
  playing.at = share * (period() - 1);
  byId("play").textContent = "Play";
  beat();
}

const anyClips = [...allSets.flatMap((set) => set.cells), ...films.flatMap((film) => film.frames.flatMap((frame) => frame.cells))]
  .some((cell) => cell?.frames || cell?.video);
