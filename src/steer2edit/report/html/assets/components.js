"use strict";
// The maps of λ, the distributions of g, and the soft threshold of theorem 3.3.

/** How many components survive (ρ, α), in fp32 as `magnitudes` computes it: λ = ±max(|g| − ρα, 0) / (ρ(1 − α)). */
function survivors(g, rho, alpha) {
  const threshold = Math.fround(rho * alpha);
  const scale = Math.fround(rho * (1 - alpha));
  let reinforced = 0;
  let suppressed = 0;
  for (const value of g) {
    const rest = Math.fround(Math.abs(value) - threshold);
    if (Math.abs(value) > threshold && Math.fround(rest / scale) !== 0) {
      if (value > 0) reinforced += 1;
      else suppressed += 1;
    }
  }
  return { reinforced, suppressed, all: reinforced + suppressed };
}

/** Blue through nothing to red; the smallest λ has a tint that tells it from what is untouched. */
function diverging() {
  return [[0, colour("down-strong")], [0.5, colour("down")], [0.5, colour("up")], [1, colour("up-strong")]];
}

function figure(title, id, label, height) {
  const chart = element("div", { class: "chart", id, role: "img", "aria-label": label });
  chart.style.height = `${height}px`;
  return element("figure", {}, element("figcaption", {}, title), chart);
}

// Maps ------------------------------------------------------------------------------------------------------------

function startMaps(data) {
  for (const map of data.maps) {
    const height = Math.min(900, Math.max(260, 90 + 15 * map.rows.length));
    const plural = `${map.unit}s`;
    const name = `λ of ${map.unit === "head" ? "every head" : "each layer's largest neurons"}`;
    const first = figure(name, `map-${map.block}`, `${name}, by layer: ${map.reinforced} ${plural} reinforced, ${map.suppressed} suppressed. A table below lists the largest.`, height);
    const box = element("div", { class: map.spread ? "pair" : "" }, first);
    byId("maps").append(box);
    drawn(`map-${map.block}`, () => drawMap(map));
    if (!map.spread) continue;
    box.append(figure("Edited neurons in each layer", `layers-${map.block}`, "How many neurons of each layer are reinforced and how many suppressed.", height));
    byId("maps").append(figure("Distribution of λ over the edited neurons", `lambda-${map.block}`, "Histogram of λ over the edited neurons.", 220));
    drawn(`layers-${map.block}`, () => drawLayers(map));
    drawn(`lambda-${map.block}`, () => drawSpreadOfLambda(map));
  }
}

function drawMap(map) {
  const hovers = map.rows.map((row) => row.lam.map((lam, i) => {
    const name = row.names ? row.names[i] : `${map.unit} ${i}`;
    const state = lam === 0 ? "untouched" : lam > 0 ? "reinforced" : "suppressed";
    return `<b>layer ${row.layer}, ${plain(name)}</b><br>λ ${digits(lam, 4)} (${state})<br>g ${digits(row.g[i], 4)}<br>‖ΔW‖/‖W‖ ${digits(row.ratio[i])}`;
  }));
  const top = map.largest || 1;
  const trace = {
    type: "heatmap", y: map.rows.map((row) => row.layer), z: map.rows.map((row) => row.lam.map((lam) => (lam === 0 ? null : lam))),
    text: hovers, hoverinfo: "text", hoverongaps: true, zmin: -top, zmax: top, colorscale: diverging(), xgap: 1, ygap: 1,
    colorbar: { title: { text: "λ" }, thickness: 12, outlinewidth: 0, tickformat: ".2~r" },
  };
  if (map.rows[0].names) trace.x0 = 1;
  plot(`map-${map.block}`, [trace], {
    xaxis: { title: { text: map.rows[0].names ? "rank by |λ| in the layer" : map.unit }, showgrid: false, zeroline: false },
    yaxis: { title: { text: "layer" }, autorange: "reversed", showgrid: false, zeroline: false },
  });
}

function drawLayers(map) {
  const y = map.rows.map((row) => row.layer);
  const bars = (name, sign, strong) => ({
    type: "bar", orientation: "h", y, x: map.rows.map((row) => sign * row[name]), name, hoverinfo: "text",
    text: map.rows.map((row) => `layer ${row.layer}: ${grouped(row[name])} ${name}`), textposition: "none",
    marker: { color: colour(strong) },
  });
  plot(`layers-${map.block}`, [bars("suppressed", -1, "down-strong"), bars("reinforced", 1, "up-strong")], {
    barmode: "relative", xaxis: { title: { text: "← suppressed · reinforced →" } },
    yaxis: { title: { text: "layer" }, autorange: "reversed", zeroline: false },
  });
}

function drawSpreadOfLambda(map) {
  const { x, widths, counts } = barsOf(map.spread);
  plot(`lambda-${map.block}`, [{
    type: "bar", x, y: counts, width: widths, marker: { color: x.map((value) => colour(value > 0 ? "up-strong" : "down-strong")) },
    hoverinfo: "text", text: x.map((value, i) => `λ about ${digits(value)}: ${grouped(counts[i])}`), textposition: "none",
  }], { xaxis: { title: { text: "λ" } }, yaxis: { title: { text: "neurons" }, ...countAxis(counts) }, bargap: 0 });
}

/** Counts that differ by more than a hundredfold need a logarithmic axis. */
function countAxis(counts) {
  return Math.max(...counts) > 100 ? { type: "log", dtick: 1 } : { type: "linear", rangemode: "tozero" };
}

function barsOf({ edges, counts }) {
  return { x: counts.map((_, i) => (edges[i] + edges[i + 1]) / 2), widths: counts.map((_, i) => edges[i + 1] - edges[i]), counts };
}

// The threshold ---------------------------------------------------------------------------------------------------

function startSpreads(data) {
  const place = byId("spreads");
  const alpha = slider(place, "alpha", "α (from dense to sparse)", 0, 0.99, data.alpha, (v) => v, (v) => v, 0.01);
  for (const block of data.blocks) {
    const g = new Float32Array(bytesOf(block.values).buffer); // little-endian, as every browser's machine is
    const low = Math.min(block.largest / 100, block.rho || Infinity) || 0.001;
    const high = Math.max(block.largest * 20, block.rho || 0) || 1;
    const plural = `${block.unit}s`;
    const box = element("div", { class: "panel" }, element("h3", {}, block.block === "attn" ? "Attention heads" : "MLP neurons"));
    place.append(box);
    const rho = slider(box, `rho-${block.block}`, `ρ of ${plural}`, low, high, block.rho || block.largest, Math.log10, (v) => Number((10 ** v).toPrecision(4)));
    const off = element("input", { type: "checkbox", id: `off-${block.block}`, checked: block.rho === null });
    box.append(element("label", { class: "check" }, off, " off (ρ = ∞)"));
    const said = element("p", { id: `survivors-${block.block}`, class: "said", role: "status", "aria-live": "polite" });
    box.append(said, figure(`g of all ${grouped(block.total)} ${plural}; the shaded ones are left alone`, `g-${block.block}`, `Histogram of g over ${block.total} ${plural}, with the threshold.`, 260));
    const update = () => {
      const counts = off.checked ? { all: 0, reinforced: 0, suppressed: 0 } : survivors(g, rho.value(), alpha.value());
      const threshold = off.checked ? Infinity : rho.value() * alpha.value();
      const least = threshold < block.floor ? "at least " : "";
      said.textContent = `${least}${grouped(counts.all)} of ${grouped(block.total)} ${plural} survive: ${grouped(counts.reinforced)} reinforced, ${grouped(counts.suppressed)} suppressed` +
        (off.checked ? "." : `; threshold ρα = ${digits(threshold, 4)}.`) +
        (least ? ` The page holds the ${grouped(g.length)} largest |g| alone.` : "");
      said.dataset.count = counts.all;
      said.dataset.exact = String(!least);
      shown = Math.min(threshold, 1.05 * (block.largest || 1));
      redrawn(`g-${block.block}`);
    };
    let shown = 0;
    for (const control of [alpha, rho]) control.onChange(update);
    off.addEventListener("change", update);
    update();
    drawn(`g-${block.block}`, () => drawThreshold(block, shown));
  }
}

/** A range and a number that mean the same; the number takes any value. */
function slider(place, id, label, low, high, start, toRange, fromRange, step = "any") {
  const range = element("input", { type: "range", min: toRange(low), max: toRange(high), step: step === "any" ? (toRange(high) - toRange(low)) / 400 : step, "aria-label": `${label}, slider` });
  const number = element("input", { type: "number", id, min: 0, step: "any" });
  const listeners = [];
  const notify = () => listeners.forEach((listener) => listener());
  number.value = start;
  range.value = toRange(start);
  range.addEventListener("input", () => {
    number.value = fromRange(Number(range.value));
    notify();
  });
  number.addEventListener("input", () => {
    if (!valid()) return;
    range.value = toRange(Number(number.value));
    notify();
  });
  const valid = () => {
    const value = Number(number.value);
    return number.value !== "" && Number.isFinite(value) && (id === "alpha" ? value >= 0 && value < 1 : value > 0);
  };
  place.append(element("div", { class: "slider" }, element("label", { for: id }, label), range, number));
  let last = start;
  const value = () => {
    if (valid()) last = Number(number.value);
    return last;
  };
  return { value, onChange: (listener) => listeners.push(listener) };
}

function drawThreshold(block, threshold) {
  const { x, widths, counts } = barsOf(block);
  const lines = [-threshold, threshold].map((at) => ({ type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: { color: colour("ink"), width: 1, dash: "dash" } }));
  const band = { type: "rect", x0: -threshold, x1: threshold, y0: 0, y1: 1, yref: "paper", fillcolor: colour("muted"), opacity: 0.18, line: { width: 0 } };
  const top = 1.05 * (block.largest || 1);
  plot(`g-${block.block}`, [{
    type: "bar", x, y: counts, width: widths, hoverinfo: "text", textposition: "none",
    marker: { color: x.map((value) => colour(Math.abs(value) <= threshold ? "muted" : value > 0 ? "up-strong" : "down-strong")) },
    text: x.map((value, i) => `g about ${digits(value)}: ${grouped(counts[i])} ${block.unit}s`),
  }], {
    xaxis: { title: { text: "g" }, range: [-top, top] }, bargap: 0, shapes: [band, ...lines],
    yaxis: { title: { text: `${block.unit}s` }, ...countAxis(counts) },
  });
}
