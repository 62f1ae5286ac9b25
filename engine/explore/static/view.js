/** One plane of one scan on a canvas: image, similarity, labels and the marked place. */

import { clamp, edgeLetters, indexToPixel, pixelToIndex, placement, spacingOf, toIndex } from "./geometry.js";
import { Mouse } from "./mouse.js";
import { paintHu, paintLabels, paintSimilarity } from "./paint.js";

const LEAST_PIXELS = 8; // of the image, across a view
const NEAR = 0.75; // slices: so near to the marked place its ring is drawn full

export class View {
  /**
   * @param panel of the scan: `scan`, `hu`, `labels` (Planes or null), `similarity` (Uint8Array or null), `mark`
   * @param name of the plane
   * @param settings shared by all views: `window`, `opacity`, `show`
   * @param on handlers: as of `Mouse`, and `failure(error)`
   */
  constructor(panel, name, settings, axcodes, planes, on) {
    Object.assign(this, { panel, name, settings, on, plane: planes[name] });
    this.letters = edgeLetters(this.plane, axcodes);
    this.canvas = document.createElement("canvas");
    this.canvas.className = name;
    this.index = Math.floor(this.size(this.plane.cut) / 2);
    this.region = null; // the rectangle of pixels that is shown; null = the patient
    this.mouse = new Mouse(this, on);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  size(axis) {
    return this.panel.scan.shape[axis];
  }

  goTo(index) {
    this.index = clamp(Math.round(index), 0, this.size(this.plane.cut) - 1);
    this.draw();
  }

  step(slices) {
    const isAxial = this.plane.cut === 0; // turning the wheel down leads to the feet
    this.goTo(this.index + (isAxial ? -slices : slices));
  }

  // Drawing

  /** Draw once before the next frame, however often it is asked for. */
  draw() {
    this.pending ??= requestAnimationFrame(() => {
      this.pending = undefined;
      this.drawNow();
    });
  }

  drawNow() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    this.fit(width, height);
    const hu = this.planeOf(this.panel.hu);
    if (hu) this.put(context, paintHu(hu, this.columns, this.rows, this.settings.window), this.outline, true);
    if (this.settings.show.similarity) this.drawSimilarity(context);
    if (this.settings.show.labels && this.panel.labels) {
      const labels = this.planeOf(this.panel.labels);
      const picture = labels && paintLabels(labels, this.columns, this.rows, this.panel.classes);
      if (picture) this.put(context, picture, this.outline, false);
    }
    if (this.settings.show.crosshair) this.drawMark(context);
    this.drawLetters(context, width, height);
    this.mouse.rest(); // under it may be another slice now
  }

  /** How pixels of the picture lie on the canvas: in true proportions, the region as large as fits, in the middle. */
  fit(width, height) {
    const { across, down } = this.plane;
    const spacing = spacingOf(this.panel.scan);
    [this.columns, this.rows] = [this.size(across), this.size(down)];
    this.outline = [-0.5, -0.5, this.columns - 0.5, this.rows - 0.5];
    const [left, top, right, bottom] = this.region ?? this.patient();
    const perMm = Math.min(width / (right - left) / spacing[across], height / (bottom - top) / spacing[down]);
    this.zoom = [spacing[across] * perMm, spacing[down] * perMm];
    this.corner = [
      width / 2 - ((left + right + 1) / 2) * this.zoom[0],
      height / 2 - ((top + bottom + 1) / 2) * this.zoom[1],
    ];
  }

  /** The rectangle of pixels that the patient fills, as far as it is known. */
  patient() {
    const { scan } = this.panel;
    if (!scan.map) return this.outline;
    const [left, top, right, bottom] = this.rectangleOf(scan.map);
    const [columns, rows] = [this.columns - 0.5, this.rows - 0.5];
    return [Math.max(left, -0.5), Math.max(top, -0.5), Math.min(right, columns), Math.min(bottom, rows)];
  }

  /** The rectangle of pixels over which a parallel grid lies. */
  rectangleOf(grid) {
    const ends = [grid.shape.map(() => -0.5), grid.shape.map((size) => size - 0.5)];
    const { shift, scale } = placement(this.panel.scan, grid);
    const [first, last] = ends.map((end) => end.map((value, axis) => value * scale[axis] + shift[axis]))
      .map((index) => indexToPixel(this.plane, this.panel.scan.shape, index));
    return [first[0], Math.min(first[1], last[1]), last[0], Math.max(first[1], last[1])];
  }

  /** Show less (factor below 1) or more around a pixel, which stays where it is. */
  zoomAt([column, row], factor) {
    const kept = [column, row, column, row];
    const region = (this.region ?? this.patient()).map((edge, n) => kept[n] + (edge - kept[n]) * factor);
    if (region[2] - region[0] > LEAST_PIXELS && region[2] - region[0] < 2 * this.columns) this.region = region;
    this.draw();
  }

  /** Move the picture by CSS pixels. */
  pan(dx, dy) {
    const by = [dx / this.zoom[0], dy / this.zoom[1]];
    this.region = (this.region ?? this.patient()).map((edge, n) => edge - by[n % 2]);
    this.draw();
  }

  resetZoom() {
    this.region = null;
    this.draw();
  }

  toCanvas([column, row]) {
    return [this.corner[0] + (column + 0.5) * this.zoom[0], this.corner[1] + (row + 0.5) * this.zoom[1]];
  }

  /** The plane at this view's slice if it is here; if not it is fetched, and the last one drawn stays meanwhile. */
  planeOf(planes) {
    const values = planes.peek(this.name, this.index);
    if (!values) this.fetch(planes);
    const kept = (this.lastDrawn ??= new Map());
    if (values) kept.set(planes, values);
    return values ?? kept.get(planes);
  }

  /** Fetch the slice that is wanted now; one request at a time, so that a fast wheel skips slices. */
  async fetch(planes) {
    this.fetching ??= new Set();
    if (this.fetching.has(planes)) return;
    this.fetching.add(planes);
    try {
      await planes.fetch(this.name, this.index);
    } catch (error) {
      this.on.failure(error);
      return; // stays in `fetching`: asking again for every frame would not help
    }
    this.fetching.delete(planes);
    this.draw();
  }

  /** Draw a picture over a rectangle [left, top, right, bottom] of pixels. */
  put(context, picture, [left, top, right, bottom], isSmooth) {
    const [x, y] = this.toCanvas([left, top]);
    const [endX, endY] = this.toCanvas([right, bottom]);
    context.imageSmoothingEnabled = isSmooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, x, y, endX - x, endY - y);
  }

  drawSimilarity(context) {
    const { scan, similarity } = this.panel;
    if (!similarity || !scan.map) return;
    const { cut, across, down, is_flipped: isFlipped } = this.plane;
    const { shift, scale } = placement(scan, scan.map);
    const shape = scan.map.shape;
    const slice = Math.round((this.index - shift[cut]) / scale[cut]);
    if (slice < 0 || slice >= shape[cut]) return;
    const strides = [shape[1] * shape[2], shape[2], 1];
    const [columns, rows] = [shape[across], shape[down]];
    const picture = paintSimilarity((at) => {
      const row = Math.floor(at / columns);
      const index = isFlipped ? rows - 1 - row : row;
      return similarity[slice * strides[cut] + index * strides[down] + (at % columns) * strides[across]];
    }, columns, rows);
    context.save();
    context.globalAlpha = this.settings.opacity;
    const [x, y] = this.toCanvas(this.outline.slice(0, 2));
    context.beginPath();
    context.rect(x, y, this.columns * this.zoom[0], this.rows * this.zoom[1]);
    context.clip();
    this.put(context, picture, this.rectangleOf(scan.map), true);
    context.restore();
  }

  /** Lines and a ring at the marked place; the ring is thin where this is another slice. */
  drawMark(context) {
    const { scan, mark } = this.panel;
    if (!mark) return;
    const index = toIndex(scan, mark.point);
    const [x, y] = this.toCanvas(indexToPixel(this.plane, scan.shape, index));
    const [left, top] = this.toCanvas(this.outline.slice(0, 2));
    const [right, bottom] = this.toCanvas(this.outline.slice(2));
    const isHere = Math.abs(index[this.plane.cut] - this.index) <= NEAR;
    context.strokeStyle = mark.colour;
    const stroke = (width, opacity, path) => {
      context.lineWidth = width;
      context.globalAlpha = opacity;
      context.beginPath();
      path();
      context.stroke();
    };
    const gap = 10;
    stroke(1, isHere ? 0.7 : 0.3, () => {
      for (const [from, to] of [[left, x - gap], [x + gap, right]]) if (to > from) {
        context.moveTo(from, y);
        context.lineTo(to, y);
      }
      for (const [from, to] of [[top, y - gap], [y + gap, bottom]]) if (to > from) {
        context.moveTo(x, from);
        context.lineTo(x, to);
      }
    });
    stroke(isHere ? 2 : 1, isHere ? 1 : 0.5, () => context.arc(x, y, 6, 0, 2 * Math.PI));
    context.globalAlpha = 1;
  }

  drawLetters(context, width, height) {
    const { left, right, top, bottom } = this.letters;
    const write = (text, x, y, align) => {
      context.textAlign = align;
      context.strokeText(text, x, y);
      context.fillText(text, x, y);
    };
    context.font = "600 13px system-ui, sans-serif";
    context.fillStyle = "#e8eaed";
    context.strokeStyle = "#000";
    context.lineWidth = 3;
    context.textBaseline = "middle";
    write(left, 6, height / 2, "left");
    write(right, width - 6, height / 2, "right");
    write(top, width / 2, 11, "center");
    write(bottom, width / 2, height - 10, "center");
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = "#9aa3af";
    write(`${this.name} ${this.index + 1}/${this.size(this.plane.cut)}`, 6, 11, "left");
  }

  // Reading

  /** The pixel at CSS pixels of the canvas. */
  pixelAt([x, y]) {
    return [x, y].map((value, n) => (value - this.corner[n]) / this.zoom[n] - 0.5);
  }

  /** The index at CSS pixels of the canvas; null beside the picture. */
  indexAt(place) {
    if (!this.corner) return null;
    const pixel = this.pixelAt(place);
    const isOn = pixel.every((value, n) => value >= -0.5 && value <= [this.columns, this.rows][n] - 0.5);
    return isOn ? pixelToIndex(this.plane, this.panel.scan.shape, this.index, pixel) : null;
  }

  /** HU and channel of the label at an index of this view's slice; undefined where the slice is not here yet. */
  valuesAt(index) {
    const [column, row] = indexToPixel(this.plane, this.panel.scan.shape, index).map(Math.round);
    const at = clamp(row, 0, this.rows - 1) * this.columns + clamp(column, 0, this.columns - 1);
    const read = (planes) => planes?.peek(this.name, this.index)?.[at];
    return { hu: read(this.panel.hu), label: read(this.panel.labels) };
  }
}
