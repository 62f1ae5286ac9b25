/** What the page asks the server. Failures throw an Error with the server's words. */

async function ask(path, method = "GET") {
  const response = await fetch(path, { method, cache: "no-store" }).catch(() => {
    throw new Error("The server does not answer. Was the command ended?");
  });
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

const askBytes = async (path) => (await ask(path)).arrayBuffer();
const askJson = async (path) => (await ask(path)).json();
const at = (point) => `at=${point.map((value) => value.toFixed(3)).join(",")}`;

export const fetchSession = () => askJson("scans");

export const fetchMatch = (query, key, point) => askJson(`matches/${query}/${key}?${at(point)}`);

export const fetchSimilarity = async (query, key, point) =>
  new Uint8Array(await askBytes(`similarity/${query}/${key}?${at(point)}`));

export const startCarrying = (scan) => ask(`scans/${scan}/labels`, "POST");

/** Planes that were fetched, the last ones of a scan kept: HU, or channels of labels. */
export class Planes {
  static MOST = 128;

  constructor(scan, { areLabels }) {
    this.folder = areLabels ? `scans/${scan}/labels` : `scans/${scan}`;
    this.Values = areLabels ? Uint8Array : Int16Array;
    this.kept = new Map();
  }

  /** The plane if it is here, else undefined. */
  peek(plane, index) {
    return this.kept.get(`${plane}/${index}`);
  }

  async fetch(plane, index) {
    const name = `${plane}/${index}`;
    const values = this.kept.get(name) ?? new this.Values(await askBytes(`${this.folder}/${name}`));
    this.kept.delete(name);
    this.kept.set(name, values);
    if (this.kept.size > Planes.MOST) this.kept.delete(this.kept.keys().next().value);
    return values;
  }
}
