// A visitor's image at the size that is made, as redif_sdk/inputs/images.py brings it there: what is beyond is cut evenly,
// and the rest scaled by Pillow's Lanczos filter, in Pillow's integers. So the page starts from the values that Python
// starts from.

const BITS = 22; // of Pillow's weights after the point
const LOBES = 3;
const BAND = 1 << 20; // pixels that are read at a time: photographs are large

/**
 * Uint8Array (height, width, channels) of `source`: {width, height, read(top, count)}, where read gives that many rows
 * as RGBA. What is transparent lies on white, unless there are four channels.
 */
export function fit(source, height, width, channels) {
  const [left, top, right, bottom] = cut(source, height, width);
  const across = weights(source.width, left, right, width);
  const down = weights(source.height, top, bottom, height);
  const first = down === null ? 0 : down[0].first;
  const end = down === null ? source.height : down.at(-1).first + down.at(-1).taps.length;
  const premultiplied = channels === 4 && (across !== null || down !== null);
  const narrow = new Uint8Array((end - first) * width * channels);
  const most = Math.max(1, Math.floor(BAND / source.width));
  for (let from = first; from < end; from += most) {
    const count = Math.min(most, end - from);
    const rows = coloured(source.read(from, count), channels, premultiplied);
    const to = narrow.subarray((from - first) * width * channels);
    if (across === null) {
      to.set(rows);
      continue;
    }
    for (let row = 0; row < count; row += 1) {
      const begin = row * source.width * channels;
      for (let column = 0; column < width; column += 1) {
        for (let channel = 0; channel < channels; channel += 1) {
          const at = begin + across[column].first * channels + channel;
          to[(row * width + column) * channels + channel] = weighed(rows, at, channels, across[column].taps);
        }
      }
    }
  }
  const made = down === null ? narrow : new Uint8Array(height * width * channels);
  for (let row = 0; down !== null && row < height; row += 1) {
    for (let i = 0; i < width * channels; i += 1) {
      const at = (down[row].first - first) * width * channels + i;
      made[row * width * channels + i] = weighed(narrow, at, width * channels, down[row].taps);
    }
  }
  return premultiplied ? divided(made) : made;
}

/** The part of the image that is kept: Pillow's ImageOps.fit, whose box is of 32-bit floats. */
function cut(source, height, width) {
  const ratio = width / height;
  const own = source.width / source.height;
  const across = own > ratio ? ratio * source.height : source.width;
  const down = own < ratio ? source.width / ratio : source.height;
  const left = (source.width - across) * 0.5;
  const top = (source.height - down) * 0.5;
  return [left, top, left + across, top + down].map(Math.fround);
}

/** Of each of `count` places its first source and the weights from there; null: the values stay as they are. */
function weights(size, from, to, count) {
  if (count === size && from === 0 && to === size) {
    return null;
  }
  const scale = Math.fround(to - from) / count;
  const wide = Math.max(scale, 1);
  const support = LOBES * wide;
  return Array.from({ length: count }, (_, place) => {
    const centre = from + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(size, Math.trunc(centre + support + 0.5));
    const shares = Array.from({ length: end - first }, (_, i) => lanczos((i + first - centre + 0.5) * (1 / wide)));
    const sum = shares.reduce((total, share) => total + share, 0);
    const taps = Float64Array.from(shares, (share) => {
      const value = (share / sum) * 2 ** BITS;
      return Math.trunc(value < 0 ? value - 0.5 : value + 0.5);
    });
    return { first, taps };
  });
}

function lanczos(x) {
  return x >= -LOBES && x < LOBES ? sinc(x) * sinc(x / LOBES) : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

function weighed(values, at, stride, taps) {
  let sum = 2 ** (BITS - 1);
  for (let i = 0; i < taps.length; i += 1) {
    sum += values[at + i * stride] * taps[i];
  }
  return Math.min(Math.max(Math.floor(sum / 2 ** BITS), 0), 255);
}

/** RGBA to 1 (grey), 3 or 4 channels, as Pillow composes, converts and multiplies. */
function coloured(rgba, channels, premultiplied) {
  const values = new Uint8Array((rgba.length / 4) * channels);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += channels) {
    const alpha = rgba[from + 3];
    const [red, green, blue] = [0, 1, 2].map((channel) => {
      const value = rgba[from + channel];
      return channels === 4 ? (premultiplied ? share(value * alpha + 128) : value) : onWhite(value, alpha);
    });
    if (channels === 1) {
      values[to] = (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16;
    } else {
      values.set(channels === 4 ? [red, green, blue, alpha] : [red, green, blue], to);
    }
  }
  return values;
}

function onWhite(value, alpha) {
  return alpha === 255 ? value : share((value * alpha + 255 * (255 - alpha)) * 128 + (128 << 7)) >> 7;
}

function share(product) { // by 255
  return ((product >> 8) + product) >> 8;
}

function divided(values) {
  for (let at = 0; at < values.length; at += 4) {
    const alpha = values[at + 3];
    for (let channel = 0; alpha > 0 && alpha < 255 && channel < 3; channel += 1) {
      values[at + channel] = Math.min(Math.floor((255 * values[at + channel]) / alpha), 255);
    }
  }
  return values;
}
