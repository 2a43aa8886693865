// Shows one sample at a time: only its tokens become elements. The data is one array per quantity over all samples.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

function bytes(text) {
  const raw = atob(text);
  const found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found.buffer;
}

const tokens = new Uint32Array(bytes(data.tokens));
const ends = new Uint32Array(bytes(data.ends));
const documents = new Uint32Array(bytes(data.documents));
const columns = {};
const column = (name) => (columns[name] ??= new Float32Array(bytes(data.columns[name])));
const from = (borders, index) => (index ? borders[index - 1] : 0);
const largest = (values) => values.reduce((most, x) => (Math.abs(x) > most ? Math.abs(x) : most), 0) || 1;
const number = (x) => (Number.isNaN(x) ? "none" : String(Number(x.toPrecision(4))).replace("-", "−"));

// Of each quantity: its value for a token of a document, the hue and the strength of a value's colour, and the legend.
const plain = (hue, share) => (x) => [hue, Math.min(1, Math.max(0, share(x)))];
const scales = {
  weight: { colour: plain("c1", (x) => x / most("weight")), ticks: () => [0, most("weight")], none: "no loss" },
  logp: { colour: plain("c2", (x) => -x / 5), ticks: () => [0, -5], none: "not sampled" },
  advantage: {
    colour: (x) => [x < 0 ? "wrong" : "right", Math.abs(x) / most("advantage")],
    ticks: () => [-most("advantage"), most("advantage")],
    none: "no advantage",
  },
  position: { colour: plain("c4", (x) => x / longest()), ticks: () => [0, longest()], none: "" },
};
const greatest = {};
const most = (name) => (greatest[name] ??= largest(column(name)));
const value = (name, token, first) => (name === "position" ? token - first : column(name)[token]);
const hasNone = (name, x) => Number.isNaN(x) || (name === "weight" && x === 0);

const samples = data.samples.id.map((id, index) => ({ id, index }));
const order = { verdict: data.samples.verdict, reason: data.samples.reason };
let shown = samples;
let current = 0;
let quantity = document.querySelector("[name=quantity]:checked").value;

const documentsOf = (sample) =>
  Array.from({ length: documents[sample] - from(documents, sample) }, (_, i) => from(documents, sample) + i);
const longest = () => Math.max(1, ...documentsOf(current).map((d) => ends[d] - from(ends, d) - 1));

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text ?? "";
  if (name) made.className = name;
  return made;
}

function mark(sample) {
  const verdict = data.samples.verdict[sample];
  return verdict ? [element("b", verdict === "right" ? "✓" : "✗", verdict)] : [];
}

const textOf = (token) => data.texts[tokens[token]] || `⟨${data.ids[tokens[token]]}⟩`;

function paint(span, name, first) {
  const x = value(name, Number(span.dataset.token), first);
  span.classList.toggle("none", hasNone(name, x));
  const [hue, share] = hasNone(name, x) ? ["ink", 0] : scales[name].colour(x);
  span.style.cssText = `--hue: var(--${hue}); --share: ${share.toFixed(3)}`;
}

function showLegend() {
  const [low, high] = scales[quantity].ticks();
  const steps = [0, 0.25, 0.5, 0.75, 1].map((part) => {
    const key = element("i");
    const [hue, share] = scales[quantity].colour(low + part * (high - low));
    key.style.cssText = `--hue: var(--${hue}); --share: ${share.toFixed(3)}`;
    return key;
  });
  const none = scales[quantity].none ? [element("b", `grey: ${scales[quantity].none}`)] : [];
  at("legend").replaceChildren(element("span", number(low)), ...steps, element("span", number(high)), ...none);
}

function textElement(place) {
  const [first, end] = [from(ends, place), ends[place]];
  const box = element("section", "", "text");
  const title = element("h3", data.names[place]);
  let trained = 0;
  for (let t = first; t < end; t++) trained += column("weight")[t] > 0;
  const counts = `  ${(end - first).toLocaleString("en")} tokens, ${trained.toLocaleString("en")} with loss`;
  title.append(element("small", counts));
  const body = element("div", "", "tokens");
  body.dataset.first = first;
  for (let t = first; t < end; t++) {
    const span = element("span", textOf(t).replaceAll("\n", "↵\n"));
    span.dataset.token = t;
    paint(span, quantity, first);
    body.append(span);
  }
  box.append(title, body);
  return box;
}

function show(sample) {
  for (const old of document.querySelectorAll("#list [aria-current]")) old.removeAttribute("aria-current");
  current = sample;
  const button = at("list").children[sample].firstChild;
  button.setAttribute("aria-current", "true");
  at("list").scrollTop = button.offsetTop - at("list").offsetTop - at("list").clientHeight / 2;
  at("title").replaceChildren(data.samples.id[sample], " ", ...mark(sample));
  const facts = Object.entries({ verdict: order.verdict[sample], reason: order.reason[sample], ...data.samples.facts[sample] });
  at("facts").replaceChildren(
    ...facts.filter(([, text]) => text).map(([name, text]) => {
      const row = element("div");
      row.append(element("dt", name), element("dd", text));
      return row;
    }),
  );
  at("texts").replaceChildren(...documentsOf(sample).map(textElement));
  at("token").textContent = "Point at a token, or tap it.";
  showLegend();
}

function turn(by) {
  const place = shown.findIndex((sample) => sample.index === current);
  const next = shown[place < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, place + by))];
  if (next) show(next.index);
}

const wholeText = (sample) => {
  let text = `${data.samples.id[sample]}\n`;
  for (const d of documentsOf(sample)) {
    text += `${data.names[d]}\n`;
    for (let t = from(ends, d); t < ends[d]; t++) text += data.texts[tokens[t]];
  }
  return text.toLowerCase();
};
const searched = [];

function filter() {
  const wanted = at("find").value.toLowerCase();
  const fits = ({ index }) =>
    ["verdict", "reason"].every((name) => !at(name)?.value || order[name][index] === at(name).value) &&
    (!wanted || (searched[index] ??= wholeText(index)).includes(wanted));
  shown = samples.filter(fits);
  const kept = new Set(shown.map(({ index }) => index));
  samples.forEach(({ index }) => (at("list").children[index].hidden = !kept.has(index)));
  at("count").textContent = `${shown.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")}`;
  if (shown.length && !kept.has(current)) show(shown[0].index);
}

function explain(event) {
  const span = event.target.closest?.("[data-token]");
  if (!span) return;
  const token = Number(span.dataset.token);
  const first = Number(span.parentNode.dataset.first);
  const names = [...document.querySelectorAll("[name=quantity]")].map((input) => [input.value, input.parentNode.textContent]);
  const values = names.map(([name, label]) => `${label.trim()} ${number(value(name, token, first))}`);
  at("token").textContent = `${JSON.stringify(textOf(token))} · id ${data.ids[tokens[token]]} · ${values.join(" · ")}`;
  for (const old of document.querySelectorAll(".chosen")) old.classList.remove("chosen");
  span.classList.add("chosen");
}

at("list").append(
  ...samples.map(({ id, index }) => {
    const [row, button] = [element("li"), element("button")];
    button.type = "button";
    button.title = id;
    const label = element("span"); // from the right, so that the end of an id is seen
    label.append(element("bdi", id));
    button.append(...mark(index), label);
    button.addEventListener("click", () => show(index));
    row.append(button);
    return row;
  }),
);
for (const name of ["verdict", "reason"]) at(name)?.addEventListener("change", filter);
at("find").addEventListener("input", filter);
at("previous").addEventListener("click", () => turn(-1));
at("next").addEventListener("click", () => turn(1));
for (const kind of ["pointerover", "click"]) at("texts").addEventListener(kind, explain);
document.querySelector("fieldset").addEventListener("change", (event) => {
  quantity = event.target.value;
  for (const body of document.querySelectorAll(".tokens")) {
    for (const span of body.children) paint(span, quantity, Number(body.dataset.first));
  }
  showLegend();
});
addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const by = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
  if (by) turn(by);
  if (event.key === "/") at("find").focus();
  if (by || event.key === "/") event.preventDefault();
});
filter();
show(0);
document.body.dataset.readyMs = performance.now().toFixed(0);
