"use strict";
// The browser of prompts and answers: of what was chosen on test, and of each configuration on validation.

const PER_PAGE = 20;
const SHOWN = 1500; // characters of an answer before "show all"

class Answers {
  constructor(data, trials) {
    this.data = data;
    this.trials = new Map((trials ? trials.trials : []).map((trial) => [trial.id, trial]));
    this.chosen = new Set(trials ? Object.values(trials.chosen) : []);
    this.tables = {};
    this.page = 0;
    for (const id of ["split", "trial", "kind", "judged", "diff"]) byId(id).addEventListener("change", () => this.changed(id));
    byId("query").addEventListener("input", () => this.changed("query"));
    byId("previous").addEventListener("click", () => this.turn(-1));
    byId("next").addEventListener("click", () => this.turn(1));
    if (data.test) byId("split").append(element("option", { value: "test" }, "test prompts: what was chosen"));
    if (data.validation) byId("split").append(element("option", { value: "validation" }, "validation prompts: any configuration"));
    this.fillTrials();
  }

  fillTrials() {
    const ids = this.data.validation ? this.data.validation.ids.filter((id) => id !== "base") : [];
    byId("trial").append(...ids.map((id) => {
      const trial = this.trials.get(id) || { kind: "", config: id };
      const kind = this.data.titles[trial.kind] || trial.kind;
      return element("option", { value: id }, `${this.chosen.has(id) ? "★ " : ""}${kind}: ${trial.config}`);
    }));
  }

  /** The answers of one configuration on validation. */
  async show(id) {
    const packed = this.data.validation;
    if (!packed || !packed.ids.includes(id)) {
      byId("count").textContent = packed
        ? "The answers of this configuration are not in the page, which would grow too large; the run directory has them in search/answers.jsonl."
        : "The run directory does not hold the answers of the validation prompts.";
    } else {
      byId("split").value = "validation";
      if (id !== "base") byId("trial").value = id;
      await this.changed("split");
    }
    byId("answers").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    byId("answers-title").setAttribute("tabindex", "-1");
    byId("answers-title").focus({ preventScroll: true });
  }

  async changed(what) {
    this.page = 0;
    const split = byId("split").value;
    if (!this.tables[split]) this.tables[split] = await unpacked(this.data[split].data);
    byId("trial-label").hidden = split !== "validation";
    if (what === "split") {
      this.fillKinds();
      this.fillJudged();
    }
    this.draw();
  }

  async start() {
    if (byId("split").options.length) await this.changed("split");
  }

  get split() {
    return byId("split").value;
  }

  /** The ids that are shown beside each other, the original first. */
  get columns() {
    const ids = this.data[this.split].ids;
    if (this.split === "test") return ids;
    return [...new Set(["base", byId("trial").value])].filter((id) => ids.includes(id));
  }

  titleOf(id) {
    if (this.split === "test" || id === "base") return this.data.titles[id] || id;
    const trial = this.trials.get(id);
    return trial ? `${this.data.titles[trial.kind]}: ${trial.config}` : id;
  }

  placeOf(id) {
    return this.data[this.split].ids.indexOf(id);
  }

  samplesOf(row, id) {
    const which = row.which[this.placeOf(id)];
    return which < 0 ? [] : row.texts[which];
  }

  labelOf(row, id, measure) {
    const values = row.labels[measure];
    return values ? values[this.placeOf(id)] : null;
  }

  fillKinds() {
    const kinds = [...new Set(this.tables[this.split].map((row) => row.kind))];
    byId("kind").replaceChildren(element("option", { value: "" }, "all"), ...kinds.map((kind) => element("option", { value: kind }, kind)));
  }

  fillJudged() {
    const options = [element("option", { value: "" }, "in any way")];
    const last = this.split === "test" ? "the edit" : "it";
    for (const measure of this.data.measures) {
      const values = this.tables[this.split].flatMap((row) => row.labels[measure.name] || []).filter((v) => v !== null);
      if (!values.length || !values.every((value) => value === 0 || value === 1)) continue;
      options.push(element("option", { value: `1 ${measure.name}` }, `${measure.title}: yes (${last})`));
      options.push(element("option", { value: `0 ${measure.name}` }, `${measure.title}: no (${last})`));
      options.push(element("option", { value: `changed ${measure.name}` }, `${measure.title}: not as the original`));
    }
    byId("judged").replaceChildren(...options);
  }

  get rows() {
    const kind = byId("kind").value;
    const [wanted, ...rest] = byId("judged").value.split(" ");
    const measure = rest.join(" ");
    const query = byId("query").value.trim().toLocaleLowerCase();
    const columns = this.columns;
    const last = columns[columns.length - 1];
    return this.tables[this.split].filter((row) => {
      if (kind && row.kind !== kind) return false;
      if (wanted) {
        const label = this.labelOf(row, last, measure);
        if (label === null) return false;
        if (wanted === "changed" ? label === this.labelOf(row, "base", measure) : label !== Number(wanted)) return false;
      }
      if (!query) return true;
      const texts = [...row.prompt.map(([, text]) => text), ...columns.flatMap((id) => this.samplesOf(row, id))];
      return texts.some((text) => wholeText(text)[0].toLocaleLowerCase().includes(query));
    });
  }

  turn(by) {
    this.page += by;
    this.draw();
    byId("count").scrollIntoView({ block: "nearest" });
  }

  draw() {
    const rows = this.rows;
    const first = this.page * PER_PAGE;
    const shown = rows.slice(first, first + PER_PAGE);
    const all = this.tables[this.split].length;
    byId("count").textContent = rows.length
      ? `${first + 1}–${first + shown.length} of ${rows.length} prompts` + (rows.length < all ? ` (${all} in all)` : "")
      : "No prompt fits.";
    byId("count").dataset.rows = rows.length;
    byId("previous").disabled = this.page === 0;
    byId("next").disabled = first + PER_PAGE >= rows.length;
    byId("rows").replaceChildren(...shown.map((row) => this.article(row)));
  }

  article(row) {
    const prompt = row.prompt.map(([role, text]) => element("div", { class: "message" },
      row.prompt.length > 1 ? element("span", { class: "role" }, role) : "", textBlock(text)));
    const cells = this.columns.map((id) => this.card(row, id));
    return element("article", {}, element("div", { class: "prompt" }, element("span", { class: "badge" }, row.kind), ...prompt), element("div", { class: "cards" }, ...cells));
  }

  card(row, id) {
    const samples = this.samplesOf(row, id);
    const base = this.samplesOf(row, "base");
    const compare = byId("diff").checked && id !== "base";
    const texts = samples.map((text, i) => (compare && base[i] !== undefined ? markedBlock(base[i], text) : textBlock(text)));
    const kind = this.split === "test" ? id : (this.trials.get(id) || { kind: id }).kind;
    const head = element("h4", { dir: "auto" }, element("span", { class: "mark", "aria-hidden": "true" }), this.titleOf(id));
    return element("div", { class: `card kind-${/^[a-z_]+$/.test(kind) ? kind : "other"}` }, head, this.chips(row, id), ...(texts.length ? texts : [element("p", { class: "note" }, "no answer")]));
  }

  chips(row, id) {
    const list = element("ul", { class: "chips" });
    for (const measure of this.data.measures) {
      const value = this.labelOf(row, id, measure.name);
      if (value === null || (measure.common && value === measure.scale[1])) continue;
      const word = value === 1 && measure.rate ? "yes" : value === 0 && measure.rate ? "no" : digits(value);
      list.append(element("li", { class: qualityOf(measure, value) }, `${measure.title}: ${word}`));
    }
    return list;
  }
}

function qualityOf(measure, value) {
  const [worst, best] = measure.scale;
  const scaled = (value - worst) / (best - worst);
  if (!measure.rate) return "";
  return scaled >= 0.5 ? "good" : "bad";
}

/** A packed text: [what is here of it, its whole length]. */
function wholeText(text) {
  return Array.isArray(text) ? text : [text, text.length];
}

function textBlock(text) {
  const [here, length] = wholeText(text);
  const shown = element("p", { class: "answer", dir: "auto" }, here.length > SHOWN ? `${here.slice(0, SHOWN)}…` : here || " ");
  const box = element("div", {}, shown);
  if (!here) shown.append(element("em", { class: "note" }, "(empty)"));
  if (here.length > SHOWN) {
    const button = element("button", { type: "button", class: "small" }, `Show all ${grouped(here.length)} characters`);
    button.addEventListener("click", () => {
      shown.textContent = visible(here);
      button.remove();
    });
    box.append(button);
  }
  if (length > here.length) box.append(element("p", { class: "note" }, `Cut: ${grouped(here.length)} of ${grouped(length)} characters. The run directory has all of them.`));
  return box;
}

function markedBlock(before, after) {
  const parts = difference(wholeText(before)[0], wholeText(after)[0]);
  if (parts === null) {
    const box = textBlock(after);
    box.append(element("p", { class: "note" }, "Too long to be compared word by word."));
    return box;
  }
  const tags = { same: "span", new: "ins", gone: "del" };
  return element("p", { class: "answer", dir: "auto" }, ...parts.map(([kind, text]) => element(tags[kind], {}, text)));
}
