// Draws each chart of the page when it comes near the window, in the page's colours.
// A figure is the JSON text that follows its div; "var(--name)" in it is a variable of the style sheet.

const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
const config = {
  responsive: true,
  displaylogo: false,
  showAxisDragHandles: !touch,
  modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
};

function withColours(value, style) {
  if (typeof value === "string") {
    return value.startsWith("var(") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
  }
  if (Array.isArray(value)) return value.map((each) => withColours(each, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, each]) => [key, withColours(each, style)]),
  );
}

function draw(div) {
  const style = getComputedStyle(document.documentElement);
  const figure = withColours(JSON.parse(div.nextElementSibling.textContent), style);
  const zooms = !figure.layout.xaxis.fixedrange;
  // A finger that moves over a chart scrolls the page; a tap shows the values and the buttons.
  if (touch || !zooms) figure.layout.dragmode = false;
  Plotly.react(div, figure.data, figure.layout, { ...config, displayModeBar: zooms && "hover" });
  div.classList.add("drawn");
}

const charts = [...document.querySelectorAll(".chart")];
const nearby = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((each) => each.isIntersecting)) {
      nearby.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "400px" },
);
charts.forEach((div) => nearby.observe(div));
charts.forEach((div) =>
  div.addEventListener(
    "touchstart",
    () => charts.forEach((each) => each.classList.toggle("touched", each === div)),
    { passive: true },
  ),
);
dark.addEventListener("change", () => charts.filter((div) => div.matches(".drawn")).forEach(draw));
addEventListener("beforeprint", () => charts.filter((div) => !div.matches(".drawn")).forEach(draw));
