/** Pixels: HU in a window, similarity and labels in colours. All return a canvas with one pixel for each value. */

/** Colours from dark violet to pale yellow, as of matplotlib's "inferno". */
const STOPS = [[20, 11, 53], [87, 16, 110], [150, 39, 100], [207, 68, 70], [243, 120, 25], [252, 195, 40], [252, 255, 164]];
const HEAT = Array.from({ length: 256 }, (_, value) => {
  const place = (value / 255) * (STOPS.length - 1);
  const first = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[first].map((part, channel) => part + (place - first) * (STOPS[first + 1][channel] - part));
});

function painted(width, height, colourOf) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let at = 0; at < pixels.length; at++) pixels[at] = colourOf(at);
  context.putImageData(image, 0, 0);
  return canvas;
}

/** A pixel as ImageData holds it on a little-endian machine; parts and opacity 0 to 255. */
const pixel = (red, green, blue, opacity) => ((opacity << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** Grey: `level - width / 2` HU is black, `level + width / 2` white. */
export function paintHu(values, width, height, window) {
  const low = window.level - window.width / 2;
  const factor = 255 / window.width;
  return painted(width, height, (at) => {
    const grey = Math.min(Math.max((values[at] - low) * factor, 0), 255) | 0;
    return pixel(grey, grey, grey, 255);
  });
}

/** Heat: the higher the similarity, the brighter and the less transparent. `valueAt(number of the pixel)`: 0 to 255. */
export function paintSimilarity(valueAt, width, height) {
  return painted(width, height, (at) => {
    const value = valueAt(at);
    return pixel(...HEAT[value].map(Math.round), Math.round(255 * Math.sqrt(value / 255)));
  });
}

/** Labels in the colours of their classes; class 0 is transparent. */
export function paintLabels(values, width, height, classes) {
  const colours = classes.map(({ colour }, number) => (number ? pixel(...colour, 140) : 0));
  return painted(width, height, (at) => colours[values[at]]);
}
