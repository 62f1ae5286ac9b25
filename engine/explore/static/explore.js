/** The page: makes a panel for each scan, finds marked places in the other scans, and reads the keys. */

import { fetchMatch, fetchSession, fetchSimilarity } from "./client.js";
import { clamp } from "./geometry.js";
import { Panel } from "./panel.js";

const WINDOWS = {
  "Soft tissue": { level: 40, width: 400 },
  Liver: { level: 90, width: 160 },
  Lung: { level: -600, width: 1500 },
  Bone: { level: 400, width: 1800 },
};
const POLL_MS = 700;
const HU_PER_PIXEL = 2; // of a window drag
const PAGE_SLICES = 10;

const find = (id) => document.getElementById(id);
const settings = {
  window: { ...WINDOWS["Soft tissue"] },
  opacity: Number(find("opacity").value),
  show: { similarity: true, labels: true, crosshair: true },
};
let panels = [];
let active = null; // the view under the mouse
let wanted = null; // the place to find next
let isMatching = false;
let nextPoll; // a timer

const say = (text) => (find("message").textContent = text);
const failure = (error) => say(error.message);
const isBeingMade = (scan) => scan.state === "waiting" || scan.state === "working";
const drawAll = () => panels.forEach((panel) => panel.draw());

// Matching

/** Mark a place and find it elsewhere. While a match is under way, only the last place that was asked for waits. */
function mark(panel, point, isFinal) {
  panel.showQuery(point);
  if (isFinal) remember(panel.number, point);
  if (panels.some((each) => isBeingMade(each.scan))) return; // `poll` marks it again when all are embedded
  wanted = { panel, point, isFinal };
  if (!isMatching) findWanted();
}

async function findWanted() {
  isMatching = true;
  while (wanted) {
    const { panel, point, isFinal } = wanted;
    wanted = null;
    say("Finding ...");
    try {
      for (const other of panels.filter((each) => each !== panel && each.scan.state === "ready")) {
        const match = await fetchMatch(panel.number, other.number, point);
        if (wanted && wanted.panel !== panel) break; // a place of another scan was clicked meanwhile
        other.showMatch(match);
        if (isFinal && !wanted) other.showSimilarity(await fetchSimilarity(panel.number, other.number, point));
      }
      say("");
    } catch (error) {
      failure(error);
    }
  }
  isMatching = false;
}

// The address remembers the last place, so that it survives a reload and can be kept as a bookmark.

function remember(scan, point) {
  const at = point.map((value) => value.toFixed(1)).join(",");
  history.replaceState(null, "", `#scan=${scan}&at=${at}`);
}

function markRemembered() {
  const kept = new URLSearchParams(location.hash.slice(1));
  const [panel, point] = [panels[kept.get("scan")], kept.get("at")?.split(",").map(Number)];
  if (panel && point?.length === 3 && point.every(Number.isFinite)) mark(panel, point, true);
}

// Settings

function setWindow(level, width) {
  settings.window = { level: Math.round(clamp(level, -1024, 3071)), width: Math.round(clamp(width, 10, 4096)) };
  find("window").textContent = `level ${settings.window.level}, width ${settings.window.width} HU`;
  for (const button of find("presets").children) {
    const preset = WINDOWS[button.textContent];
    button.classList.toggle("on", preset.level === settings.window.level && preset.width === settings.window.width);
  }
  drawAll();
}

function setShown(name, isShown) {
  settings.show[name] = find(name).checked = isShown;
  drawAll();
}

function buildSettings(classes) {
  for (const [name, { level, width }] of Object.entries(WINDOWS)) {
    const button = document.createElement("button");
    button.textContent = name;
    button.addEventListener("click", () => setWindow(level, width));
    find("presets").append(button);
  }
  for (const name of Object.keys(settings.show)) {
    find(name).addEventListener("change", (event) => setShown(name, event.target.checked));
  }
  find("labels").parentElement.hidden = !classes.length;
  find("opacity").addEventListener("input", (event) => {
    settings.opacity = Number(event.target.value);
    drawAll();
  });
  find("help_button").addEventListener("click", () => find("help").showModal());
  for (const { name, colour } of classes.slice(1)) {
    const entry = document.createElement("span");
    const patch = document.createElement("i");
    patch.style.background = `rgb(${colour})`;
    entry.append(patch, name);
    find("legend").append(entry);
  }
  setWindow(settings.window.level, settings.window.width);
}

// Keys

const toggle = (name) => setShown(name, !settings.show[name]);
const scaleWindow = (level, width) =>
  setWindow(settings.window.level + level * settings.window.width, settings.window.width * width);
const step = (slices) => active?.step(slices);
const KEYS = {
  ArrowUp: () => step(-1),
  ArrowDown: () => step(1),
  PageUp: () => step(-PAGE_SLICES),
  PageDown: () => step(PAGE_SLICES),
  "[": () => scaleWindow(-0.1, 1),
  "]": () => scaleWindow(0.1, 1),
  "-": () => scaleWindow(0, 1 / 1.1),
  "+": () => scaleWindow(0, 1.1),
  "=": () => scaleWindow(0, 1.1),
  " ": () => panels.forEach((panel) => panel.goToMark()),
  z: () => panels.forEach((panel) => panel.views.forEach((view) => view.resetZoom())),
  s: () => toggle("similarity"),
  l: () => toggle("labels"),
  c: () => toggle("crosshair"),
  h: () => (find("help").open ? find("help").close() : find("help").showModal()),
};
Object.values(WINDOWS).forEach(({ level, width }, number) => (KEYS[number + 1] = () => setWindow(level, width)));

function readKey(event) {
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const isTheirs = event.target.matches("input, button") && /^( |Arrow.*|Page.*)$/.test(event.key);
  if (!action || isTheirs || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  action();
}

// Start

/** Ask for the scans' states until nothing is being made any more. */
async function poll() {
  try {
    const session = await fetchSession();
    const wasEmbedding = panels.some((panel) => isBeingMade(panel.scan));
    panels.forEach((panel, number) => panel.update(session.scans[number]));
    const numReady = session.scans.filter((scan) => scan.state === "ready").length;
    const isEmbedding = session.scans.some(isBeingMade);
    if (isEmbedding) {
      say(`Embedding: ${numReady} of ${session.scans.length} scans are ready. Then places can be found.`);
    } else if (wasEmbedding) {
      say("");
      markRemembered();
    }
    clearTimeout(nextPoll);
    if (isEmbedding || session.scans.some((scan) => scan.labels === "working")) nextPoll = setTimeout(poll, POLL_MS);
  } catch (error) {
    failure(error);
  }
}

async function start() {
  const session = await fetchSession();
  const on = {
    failure,
    point: mark,
    started: poll,
    enter: (view) => (active = view),
    window: (dx, dy) =>
      setWindow(settings.window.level - HU_PER_PIXEL * dy, settings.window.width + HU_PER_PIXEL * dx),
  };
  panels = session.scans.map((_, number) => new Panel(number, session, settings, on));
  find("panels").append(...panels.map((panel) => panel.root));
  buildSettings(session.classes);
  document.addEventListener("keydown", readKey);
  document.addEventListener("click", (event) => event.detail && document.activeElement.blur()); // keys are the page's
  if (session.scans.some(isBeingMade)) poll();
  else markRemembered();
}

start().catch(failure);
