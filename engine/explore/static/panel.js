/** One scan: its views, and the lines above and below them. */

import { Planes, startCarrying } from "./client.js";
import { toIndex, toWorld } from "./geometry.js";
import { View } from "./view.js";

const COLOURS = { query: "#4cc9f0", trusted: "#80ed99", doubtful: "#ffd166" };

const inMm = (point) => point.map((value) => value.toFixed(1)).join(", ");

function element(tag, className, parent) {
  const made = document.createElement(tag);
  made.className = className;
  parent.append(made);
  return made;
}

export class Panel {
  /**
   * @param number of the scan
   * @param session as the server describes it
   * @param on handlers: `point(panel, point in mm, isFinal)`, `window(dx, dy)`, `enter(view)`, `started()`
   *   when labels are being carried, `failure(error)`
   */
  constructor(number, session, settings, on) {
    Object.assign(this, { number, on, classes: session.classes, scan: session.scans[number] });
    this.hu = new Planes(number, { areLabels: false });
    this.labels = this.similarity = this.mark = null;
    this.build();
    const handlers = {
      window: on.window,
      failure: on.failure,
      hover: (view, index) => this.hover(view, index),
      point: (view, index, isFinal) => on.point(this, toWorld(this.scan, index), isFinal),
    };
    this.views = this.scan.planes.map(
      (name) => new View(this, name, settings, session.axcodes, session.planes, handlers),
    );
    this.planes.append(...this.views.map((view) => view.canvas));
    this.planes.classList.toggle("single", this.views.length === 1);
    this.update(this.scan);
  }

  build() {
    this.root = document.createElement("section");
    this.root.className = "panel";
    const title = element("h2", "", this.root);
    [title.textContent, title.title] = [this.scan.name, this.scan.path];
    const row = element("div", "row", this.root);
    this.badge = element("span", "badge", row);
    this.numbers = element("span", "numbers", row);
    this.carry = element("button", "carry", row);
    this.carry.addEventListener("click", () => this.startCarrying());
    this.planes = element("div", "planes", this.root);
    this.readout = element("div", "hover", this.root);
  }

  /** Take over what the server says of the scan now. */
  update(scan) {
    this.scan = scan;
    if (!this.labels && ["given", "ready"].includes(scan.labels)) {
      this.labels = new Planes(this.number, { areLabels: true });
    }
    this.draw();
    const texts = { working: "Carrying labels ...", ready: "Labels carried", failed: "Carrying labels failed" };
    this.carry.textContent = texts[scan.labels] ?? "Carry labels";
    this.carry.title = scan.error;
    this.carry.hidden = scan.labels === "given" || !(scan.can_carry || ["working", "ready"].includes(scan.labels));
    this.carry.disabled = ["working", "ready"].includes(scan.labels);
    if (this.badge.textContent) return; // of a place or a failure
    const states = { waiting: "waits for its embedding", working: "is being embedded ...", ready: "click a place" };
    this.numbers.textContent = states[scan.state] ?? "";
    if (scan.error) this.say("failed", "failed", scan.error);
  }

  async startCarrying() {
    this.carry.disabled = true;
    try {
      await startCarrying(this.number);
      this.on.started();
    } catch (error) {
      this.on.failure(error);
    }
  }

  draw() {
    this.views.forEach((view) => view.draw());
  }

  /** Show that this scan holds the place that was clicked. */
  showQuery(point) {
    this.similarity = null;
    this.say("query", "your place", `${inMm(point)} mm`);
    this.moveMark(point, COLOURS.query);
  }

  /** Show where the place lies here. */
  showMatch({ point_mm: point, verdict, score, cycle_mm: cycle, spread_mm: spread }) {
    const texts = [`score ${score.toFixed(2)}`];
    if (cycle !== null) texts.push(`cycle ${cycle.toFixed(1)} mm`);
    if (spread !== null) texts.push(`spread ${spread.toFixed(1)} mm`);
    if (point) texts.push(`at ${inMm(point)} mm`);
    this.say(verdict, verdict, texts.join(" · "));
    if (point) this.moveMark(point, COLOURS[verdict]);
    else this.mark = null;
    this.draw();
  }

  showSimilarity(values) {
    this.similarity = values;
    this.draw();
  }

  say(kind, badge, numbers) {
    this.badge.className = `badge ${kind}`;
    [this.badge.textContent, this.numbers.textContent, this.numbers.title] = [badge, numbers, numbers];
  }

  moveMark(point, colour) {
    this.mark = { point, colour };
    this.goToMark();
  }

  /** Turn all views to the marked place. */
  goToMark() {
    if (!this.mark) return;
    const index = toIndex(this.scan, this.mark.point);
    this.views.forEach((view) => view.goTo(index[view.plane.cut]));
  }

  /** Say what lies at an index of a view's slice; null = the mouse is not there. */
  hover(view, index) {
    if (!index) {
      this.readout.textContent = "";
      return;
    }
    this.on.enter(view);
    const { hu, label } = view.valuesAt(index);
    const texts = [`${inMm(toWorld(this.scan, index))} mm`, hu === undefined ? "" : `${hu} HU`];
    this.readout.textContent = [...texts, label ? this.classes[label].name : ""].join("   ");
  }
}
