// The data, and how elements are made. Text enters the document as text nodes only, so a prompt can say anything.
//
// Words: a *set* is what all models drew for one prompt and one seed: {seed, cells: [one per model, or null]}.
// A *delta* is a reward minus that of the base in the same set; null where either abstains or has no picture.

const data = JSON.parse(document.getElementById("data").textContent);
const { prompts, films } = data;
const models = data.models.map((model) => model.name);
const rewards = data.rewards.map((reward) => reward.name);
const last = models.length - 1;
const allSets = prompts.flatMap((prompt) => prompt.sets);
const promptOf = new Map(prompts.flatMap((prompt) => prompt.sets.map((set) => [set, prompt])));
const kinds = [...new Set(prompts.map((prompt) => prompt.kind).filter((kind) => kind !== null))];
const root = document.documentElement;

const byId = (id) => document.getElementById(id);
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const folded = (text) => text.normalize("NFKC").toLowerCase();
const linkOf = (set) => `${promptOf.get(set).id}.${set.seed}`;

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

/** The same in SVG, where everything is an attribute. */
function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Options of a select; those of a group stand under its name. */
function options(choices) {
  const groups = new Map();
  const nodes = [];
  for (const { value, label, group } of choices) {
    const option = el("option", { value }, label);
    if (!group) nodes.push(option);
    else if (groups.has(group)) groups.get(group).append(option);
    else nodes.push(groups.set(group, el("optgroup", { label: group }, option)).get(group));
  }
  return nodes;
}

/** What the browser keeps between visits; where it keeps nothing, this visit's memory. */
const store = {
  here: new Map(),
  lasts: true,
  get(name) {
    try {
      return localStorage.getItem(name) ?? this.here.get(name) ?? null;
    } catch {
      this.lasts = false;
      return this.here.get(name) ?? null;
    }
  },
  set(name, value) {
    this.here.set(name, value);
    try {
      localStorage.setItem(name, value);
    } catch {
      this.lasts = false;
    }
  },
};

/** Text to the clipboard; the button says what came of it. */
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

function copyButton(text) {
  return el("button", { type: "button", className: "copy", onclick: (event) => copy(text(), event.target) }, "Copy");
}
