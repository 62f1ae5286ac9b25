/** What the mouse does on a view. */

const STEP = 50; // of the wheel, CSS pixels a slice
const ZOOM = 1.15; // of one turn of the wheel
const MIDDLE = 1, RIGHT = 2;

const placeOf = (event) => [event.offsetX, event.offsetY];

/** What a drag that begins with this event does. */
function kindOf(event) {
  if (event.button === MIDDLE || event.ctrlKey) return "pan";
  return event.button === RIGHT || event.shiftKey ? "window" : "point";
}

export class Mouse {
  /**
   * @param view that it is on
   * @param on handlers: `point(view, index, isFinal)` of a click or drag, `window(dx, dy)`, `hover(view, index or null)`
   */
  constructor(view, on) {
    Object.assign(this, { view, on });
    this.place = null; // CSS pixels of the canvas; null = elsewhere
    this.drag = null;
    this.turned = 0; // of the wheel, CSS pixels since the last step
    const { canvas } = view;
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", () => this.release());
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("wheel", (event) => this.turn(event), { passive: false });
  }

  press(event) {
    event.preventDefault(); // the middle button would scroll
    this.view.canvas.setPointerCapture(event.pointerId);
    this.drag = { kind: kindOf(event), index: this.view.indexAt(placeOf(event)) };
  }

  move(event) {
    this.place = placeOf(event);
    this.rest();
    if (this.drag?.kind === "window") this.on.window(event.movementX, event.movementY);
    if (this.drag?.kind === "pan") this.view.pan(event.movementX, event.movementY);
    if (this.drag?.kind === "point") this.point(event);
  }

  /** The last place of a drag counts, also where the button is released beside the picture. */
  release() {
    if (this.drag?.kind === "point" && this.drag.index) this.on.point(this.view, this.drag.index, true);
    this.drag = null;
  }

  leave() {
    this.place = null;
    this.on.hover(this.view, null);
  }

  /** Say what lies under the mouse. */
  rest() {
    if (this.place) this.on.hover(this.view, this.view.indexAt(this.place));
  }

  point(event) {
    const index = this.view.indexAt(placeOf(event));
    if (!index) return;
    this.drag.index = index;
    this.on.point(this.view, index, false);
  }

  turn(event) {
    event.preventDefault();
    if (event.ctrlKey) {
      this.view.zoomAt(this.view.pixelAt(placeOf(event)), ZOOM ** Math.sign(event.deltaY));
      return;
    }
    const isNotch = event.deltaMode !== 0 || Math.abs(event.deltaY) >= STEP; // of a mouse; trackpads send small parts
    this.turned += isNotch ? STEP * Math.sign(event.deltaY) : event.deltaY;
    const slices = Math.trunc(this.turned / STEP);
    this.turned -= slices * STEP;
    if (slices) this.view.step(slices);
  }
}
