"use strict";
// What the other scripts share: the page's data, elements made from text, numbers, colours and the theme.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// The same characters as `visible` in texts.py: those that would act on what stands around them.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]/gu;

function visible(text) {
  return String(text).replace(HIDDEN, (character) => {
    const code = character.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
  });
}

/** An element with attributes and children; texts become text nodes and nothing else. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  for (const child of children) made.append(child instanceof Node ? child : visible(child));
  return made;
}

/** A text for a chart, which reads a few tags and entities: these are taken out of action. */
function plain(text) {
  return visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function wrapped(text, width = 60) {
  const lines = [""];
  for (const word of visible(text).split(" ")) {
    if (lines[lines.length - 1].length + word.length > width && lines[lines.length - 1]) lines.push("");
    lines[lines.length - 1] += (lines[lines.length - 1] ? " " : "") + word.slice(0, 200);
  }
  return lines.slice(0, 6).map(plain).join("<br>");
}

function decimals(value, digits = 2) {
  return value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
}

function digits(value, count = 3) {
  return value === null || value === undefined ? "–" : Number(value.toPrecision(count)).toString().replace("-", "−");
}

const grouped = (count) => count.toLocaleString("en-US");

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

async function unpacked(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// Theme -----------------------------------------------------------------------------------------------------------

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const charts = new Map(); // a chart's element → the function that draws it again, in the colours of now

const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    charts.set(target, target.draw);
    target.draw();
  }
}, { rootMargin: "600px" });

/** Draws a chart when it comes near the window, and again with each theme: a page with many charts opens at once. */
function drawn(id, draw) {
  byId(id).draw = draw;
  near.observe(byId(id));
}

/** Draws a chart again, if it was drawn. */
function redrawn(id) {
  if (charts.has(byId(id))) byId(id).draw();
}

window.addEventListener("beforeprint", () => {
  for (const chart of document.querySelectorAll(".chart")) {
    if (chart.draw && !charts.has(chart)) chart.draw();
  }
});

function layoutOf(changes) {
  const axis = {
    gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line-strong"), automargin: true,
    tickcolor: colour("line-strong"), ticks: "outside", ticklen: 4,
  };
  const { xaxis = {}, yaxis = {}, ...others } = changes;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: colour("plot"), font: { color: colour("ink"), size: 13, family: colour("font") },
    hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line-strong"), font: { color: colour("ink") }, align: "left" },
    margin: { l: 56, r: 16, t: 12, b: 48 }, showlegend: false, dragmode: false,
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...others,
  };
}

function plot(where, traces, layout) {
  const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
  return Plotly.react(where, traces, layoutOf(layout), options);
}

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  if (theme === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.setAttribute("data-theme", theme);
  byId("theme").textContent = `Theme: ${theme}`;
  for (const draw of charts.values()) draw();
}

function startTheme() {
  const button = byId("theme");
  let theme = "system";
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    setTheme(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(theme));
}
