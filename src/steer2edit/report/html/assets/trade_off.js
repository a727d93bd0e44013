"use strict";
// The trade-off chart and the table of all configurations.

const SHAPES = {
  base: "square", system: "diamond", steering: "circle", layer: "triangle-up", direction: "triangle-down",
  rosi: "pentagon", llm_va: "hexagon", null_space: "diamond-tall", lora: "cross", fine_tuning: "x", edit: "star",
};
const DASHES = {
  system: "dot", steering: "solid", layer: "dash", direction: "dashdot", rosi: "longdash", llm_va: "dot",
  null_space: "longdashdot", lora: "dash", fine_tuning: "dot", edit: "solid",
};
const SIZES = { edit: 13, base: 11 };

function startTradeOff(data, showAnswers) {
  const byName = Object.fromEntries(data.measures.map((measure) => [measure.name, measure]));
  const attribute = byName[data.attribute];
  const costs = data.measures.filter((measure) => measure.name !== data.attribute);
  const select = byId("cost");
  if (!attribute || !costs.length) return;
  for (const measure of costs) select.append(element("option", { value: measure.name }, measure.title));
  select.value = byName[data.cost] ? data.cost : costs[0].name;
  const chart = byId("trade-off-chart");
  const draw = () => {
    drawTradeOff(data, attribute, byName[select.value]);
    chart.removeAllListeners("plotly_click");
    chart.on("plotly_click", (event) => {
      const id = event.points[0].customdata;
      if (id) showAnswers(id);
    });
  };
  select.addEventListener("change", () => redrawn(chart.id));
  drawn(chart.id, draw);
  const details = byId("all-trials");
  details.addEventListener("toggle", () => {
    if (details.open && !byId("trials-table").firstChild) trialsTable(data, showAnswers);
  });
}

function drawTradeOff(data, attribute, cost) {
  const known = data.trials.filter((t) => t.means[cost.name] !== null && t.means[attribute.name] !== null);
  const x = (t) => t.means[cost.name];
  const y = (t) => t.means[attribute.name];
  const chosen = new Set(Object.values(data.chosen));
  const traces = [];
  for (const [kind, title] of Object.entries(data.titles)) {
    const some = known.filter((t) => t.kind === kind);
    const front = new Set(cost.name === data.cost ? data.fronts[kind] || [] : []);
    const line = some.filter((t) => front.has(t.id)).sort((a, b) => x(a) - x(b));
    if (line.length > 1) {
      traces.push({
        x: line.map(x), y: line.map(y), mode: "lines", hoverinfo: "skip", showlegend: false, legendgroup: kind,
        line: { color: colour(`kind-${kind}`), width: 1.5, shape: "hv", dash: DASHES[kind] },
      });
    }
    traces.push({
      x: some.map(x), y: some.map(y), mode: "markers", name: plain(title), legendgroup: kind, hoverinfo: "text",
      text: some.map((t) => hoverOf(t, data)), customdata: some.map((t) => t.id),
      error_y: errorBars(some, attribute, data, chosen), error_x: errorBars(some, cost, data, chosen),
      marker: {
        symbol: SHAPES[kind], size: SIZES[kind] || 9, color: colour(`kind-${kind}`), line: { color: colour("plot"), width: 0.75 },
      },
    });
  }
  const rings = known.filter((t) => chosen.has(t.id));
  traces.push({
    x: rings.map(x), y: rings.map(y), mode: "markers", name: "chosen", hoverinfo: "skip",
    marker: { symbol: "circle-open", size: 21, color: colour("ink"), line: { width: 1.5 } },
  });
  const [shapes, annotations, range] = limitOf(data.limits[cost.name], known.map(x));
  plot("trade-off-chart", traces, {
    xaxis: { title: { text: plain(`${cost.title} (${cost.better} is better)`) }, range, zeroline: false },
    yaxis: { title: { text: plain(`${attribute.title} (${attribute.better} is better)`) }, zeroline: false },
    showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
    margin: { l: 60, r: 16, t: 8, b: 52 }, shapes, annotations, hovermode: "closest",
  });
}

function errorBars(some, measure, data, chosen) {
  const ends = some.map((t) => (chosen.has(t.id) ? data.intervals[t.id][measure.name] : [null, null]));
  const value = (i) => some[i].means[measure.name];
  return {
    type: "data", symmetric: false, thickness: 1, width: 3,
    array: ends.map(([, high], i) => (high === null ? null : high - value(i))),
    arrayminus: ends.map(([low], i) => (low === null ? null : value(i) - low)),
  };
}

/** The limit's line, its name inside the chart, and a range that has room for it. */
function limitOf(limit, values) {
  const low = Math.min(0, ...values);
  const most = Math.max(...values, 0);
  const far = limit === undefined || limit > 2 * most;
  const top = far ? most : Math.max(most, limit);
  const pad = 0.04 * (top - low) || 0.05;
  const range = [low - pad, top + pad];
  if (limit === undefined || far) return [[], [], range];
  const line = { type: "line", x0: limit, x1: limit, y0: 0, y1: 1, yref: "paper", line: { color: colour("muted"), width: 1, dash: "dash" } };
  const name = {
    x: limit, y: 1, yref: "paper", text: `limit ${digits(limit)}`, showarrow: false, textangle: -90, xanchor: "right", yanchor: "top",
    font: { size: 11, color: colour("muted") },
  };
  return [[line], [name], range];
}

function hoverOf(trial, data) {
  const ends = data.intervals[trial.id] || {};
  const lines = data.measures.filter((m) => trial.means[m.name] !== null).map((m) => {
    const [low, high] = ends[m.name] || [null, null];
    const interval = low === null ? "" : ` [${decimals(low)}, ${decimals(high)}]`;
    return `${plain(m.title)}: ${decimals(trial.means[m.name])}${interval}`;
  });
  return [`<b>${plain(data.titles[trial.kind] || trial.kind)}</b>`, wrapped(trial.config), ...lines].join("<br>");
}

function trialsTable(data, showAnswers) {
  const columns = [
    { title: "Method", value: (t) => data.titles[t.kind] || t.kind },
    { title: "Configuration", value: (t) => t.config },
    ...data.measures.map((m) => ({ title: m.title, number: true, value: (t) => t.means[m.name] })),
  ];
  const body = element("tbody");
  const head = element("tr");
  const fill = (trials) => body.replaceChildren(...trials.map((t) => {
    const button = element("button", { type: "button", class: "small" }, "answers");
    button.addEventListener("click", () => showAnswers(t.id));
    button.setAttribute("aria-label", visible(`Answers of ${t.config}`));
    const cells = columns.map((c) => (c.number ? element("td", {}, decimals(c.value(t))) : element("td", { class: "text", dir: "auto" }, c.value(t))));
    return element("tr", {}, ...cells, element("td", {}, button));
  }));
  columns.forEach((column) => {
    const button = element("button", { type: "button", class: "sort" }, column.title);
    const cell = element("th", { scope: "col" }, button);
    button.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") !== "descending";
      head.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      fill([...data.trials].sort((a, b) => ordered(column.value(a), column.value(b)) * (down ? -1 : 1)));
    });
    head.append(cell);
  });
  head.append(element("th", { scope: "col" }, element("span", { class: "sr" }, "Answers")));
  fill(data.trials);
  const caption = element("caption", {}, element("span", {}, "Every configuration with its means on validation; a column's name sorts by it."));
  byId("trials-table").append(element("table", {}, caption, element("thead", {}, head), body));
}

function ordered(a, b) {
  if (a === null || b === null) return (b === null) - (a === null);
  if (typeof a === "number") return a - b;
  return a < b ? -1 : Number(a > b);
}
