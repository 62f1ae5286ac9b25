/**
 * Where things lie. Points are [x, y, z] in world mm (RAS+), indices [d, h, w] of a grid {shape, affine, inverse}.
 * Pixels are [column, row] of a plane's picture, pixel centres at integers, row 0 on top.
 */

/** A 4 x 4 matrix applied to three numbers. */
function transformed(matrix, [a, b, c]) {
  return matrix.slice(0, 3).map((row) => row[0] * a + row[1] * b + row[2] * c + row[3]);
}

export const toWorld = (grid, index) => transformed(grid.affine, index);

export const toIndex = (grid, point) => transformed(grid.inverse, point);

/** Voxel size along (D, H, W), mm. */
export function spacingOf(grid) {
  return [0, 1, 2].map((axis) => Math.hypot(...grid.affine.slice(0, 3).map((row) => row[axis])));
}

/** Where a pixel lies in the volume whose plane `plane` is cut at `at`. */
export function pixelToIndex(plane, shape, at, [column, row]) {
  const index = [];
  index[plane.cut] = at;
  index[plane.across] = column;
  index[plane.down] = plane.is_flipped ? shape[plane.down] - 1 - row : row;
  return index;
}

export function indexToPixel(plane, shape, index) {
  const down = index[plane.down];
  return [index[plane.across], plane.is_flipped ? shape[plane.down] - 1 - down : down];
}

/** How a grid lies in another one that is parallel to it: outer index = scale * inner index + shift, per axis. */
export function placement(outer, inner) {
  const shift = toIndex(outer, toWorld(inner, [0, 0, 0]));
  const next = toIndex(outer, toWorld(inner, [1, 1, 1]));
  return { shift, scale: next.map((value, axis) => value - shift[axis]) };
}

/** The letters at the edges of a picture, from the directions to which indices grow ("SPL"). */
export function edgeLetters(plane, axcodes) {
  const opposite = { S: "I", I: "S", P: "A", A: "P", L: "R", R: "L" };
  const [right, below] = [axcodes[plane.across], axcodes[plane.down]];
  const [top, bottom] = plane.is_flipped ? [below, opposite[below]] : [opposite[below], below];
  return { left: opposite[right], right, top, bottom };
}

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
