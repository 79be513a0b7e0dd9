// The image that a visitor starts from: opened, brought to the size that is made, and painted over where it is made anew.

import { fit } from "./fit.js";

const $ = (id) => document.getElementById(id);
const LARGEST_FILE = 64 << 20; // bytes
const LARGEST_IMAGE = 1 << 26; // pixels
const MOST_TIMES = 16; // the pixels of a student's own size: larger images do not choose the size
const BRUSHES = 8; // in the side of an image
const USUAL = 0.8; // strength, without a mask
const SMALL = 128; // pixels: smaller images are shown with hard edges
const PAINT = [79, 70, 229, 150];
const BRUSH = [255, 255, 255, 120];

export class Editor {
  /** `config` is student.json, `size()` gives [height, width] of the form and `steps()` its steps. */
  constructor(config, { size, steps, onSize, onError }) {
    Object.assign(this, { config, size, steps, onSize, onError });
    this.channels = config.latents.channels / config.pixelShuffle ** 2;
    this.forget();
    $("start").hidden = !config.startsFrom.includes("image");
    $("paint").hidden = $("unmask").hidden = $("mask").hidden = !config.startsFrom.includes("mask");
    $("file").addEventListener("change", () => this.open($("file").files[0]));
    $("remove").addEventListener("click", () => this.remove());
    $("unmask").addEventListener("click", () => this.repaint(() => this.mask.fill(0)));
    $("strength").addEventListener("input", () => { this.touched = true; this.show(); });
    this.listen($("mask"));
  }

  forget() {
    this.bitmap?.close();
    this.bitmap = null;
    this.levels = null; // (height, width, channels)
    this.mask = null; // (height, width), 1 where it is made anew
    this.touched = false; // whether the visitor chose the strength
    this.cursor = null; // [x, y] of the brush in pixels
  }

  remove() {
    this.forget();
    $("file").value = "";
    this.show();
    $("file").focus();
  }

  async open(file) {
    if (!file) {
      return;
    }
    let bitmap;
    try {
      if (file.size > LARGEST_FILE) {
        throw new Error(`${file.name} has more than 64 MB; choose a smaller file.`);
      }
      bitmap = await decoded(file);
      if (bitmap.width * bitmap.height > LARGEST_IMAGE) {
        throw new Error(`${file.name} has ${bitmap.width} x ${bitmap.height} pixels; choose one of at most 64 million.`);
      }
    } catch (error) {
      bitmap?.close();
      $("file").value = "";
      this.onError(error.message);
      return;
    }
    this.forget();
    this.bitmap = bitmap;
    this.onError(null);
    this.choose();
    this.resize();
  }

  /** A student of several sizes makes the image's own size, cut to what it takes, unless that is far too large. */
  choose() {
    const { latents, pixelShuffle } = this.config;
    const sides = { height: this.bitmap.height, width: this.bitmap.width };
    const own = latents.height * latents.width * pixelShuffle ** 2;
    if (sides.height * sides.width > MOST_TIMES * own) {
      return;
    }
    const unit = latents.multiple * pixelShuffle;
    const most = (latents.largest ?? Infinity) * pixelShuffle;
    for (const axis of latents.dynamic) {
      this.onSize(axis, Math.min(most, Math.max(unit, Math.floor(sides[axis] / unit) * unit)));
    }
  }

  /** Bring the image to the form's size, and the mask with it. */
  resize() {
    const [height, width] = this.size();
    if (this.bitmap === null || (this.levels !== null && this.height === height && this.width === width)) {
      return;
    }
    const before = this.mask;
    const mask = new Uint8Array(height * width);
    for (let i = 0; before !== null && i < mask.length; i += 1) {
      const row = Math.floor(((Math.floor(i / width) + 0.5) * this.height) / height);
      const column = Math.floor((((i % width) + 0.5) * this.width) / width);
      mask[i] = before[row * this.width + column];
    }
    Object.assign(this, { height, width, mask, levels: fit(rowsOf(this.bitmap), height, width, this.channels) });
    const side = Math.max(height, width);
    $("brush").max = String(Math.max(2, side >> 1));
    $("brush").value = String(Math.max(2, Math.round(side / BRUSHES)));
    for (const canvas of [$("given"), $("mask")]) {
      Object.assign(canvas, { height, width });
      canvas.className = side < SMALL ? "small" : "";
    }
    const pixels = new ImageData(width, height);
    for (let i = 0; i < height * width; i += 1) {
      for (let channel = 0; channel < 4; channel += 1) {
        const from = this.channels < 3 && channel < 3 ? 0 : channel;
        pixels.data[i * 4 + channel] = from < this.channels ? this.levels[i * this.channels + from] : 255;
      }
    }
    $("given").getContext("2d").putImageData(pixels, 0, 0);
    this.show();
  }

  /** {levels, mask, steps} of a request at the form's size and steps; null: from noise. */
  begin() {
    this.resize();
    return this.bitmap === null ? null : { levels: this.levels, mask: this.painted() ? this.mask : null, steps: this.rows() };
  }

  painted() {
    return this.mask !== null && this.mask.includes(1);
  }

  /** How many of the table's last steps are run: what the visitor chose, or the usual share of them. */
  rows() {
    const steps = this.steps();
    const usual = this.painted() ? steps : Math.max(1, Math.floor(USUAL * steps + 1e-9));
    return this.touched ? Math.min(Number($("strength").value), steps) : usual;
  }

  /** Show what is chosen: the image, the mask, the strength. */
  show() {
    $("editor").hidden = this.bitmap === null;
    if (this.bitmap === null) {
      return;
    }
    const steps = this.steps();
    const rows = this.rows();
    const strength = Number((rows / steps).toPrecision(3));
    $("strength").max = String(steps);
    $("strength").value = String(rows);
    $("strength").disabled = steps === 1;
    const which = rows === steps ? `all ${steps} steps` : `the last ${rows} of ${steps} steps`;
    const text = steps === 1 ? "1: one step keeps little or nothing of the image" : `${strength}: ${which}`;
    $("strength-text").textContent = text;
    $("strength").setAttribute("aria-valuetext", text);
    $("unmask").disabled = !this.painted();
    this.draw();
  }

  draw() {
    const shown = new ImageData(this.width, this.height);
    const brush = this.cursor === null ? [] : this.under(...this.cursor);
    this.mask.forEach((painted, i) => painted && shown.data.set(PAINT, i * 4));
    brush.forEach((i) => shown.data.set(BRUSH, i * 4));
    $("mask").getContext("2d").putImageData(shown, 0, 0);
  }

  // -------------------------------------------------------------- painting

  /** Pixels of the image that the brush covers at (x, y). */
  under(x, y) {
    const radius = Number($("brush").value) / 2;
    const found = [];
    for (let row = Math.max(0, Math.floor(y - radius)); row < Math.min(this.height, y + radius); row += 1) {
      for (let column = Math.max(0, Math.floor(x - radius)); column < Math.min(this.width, x + radius); column += 1) {
        if (Math.hypot(row + 0.5 - y, column + 0.5 - x) <= radius) {
          found.push(row * this.width + column);
        }
      }
    }
    return found;
  }

  repaint(change) {
    change();
    this.show();
  }

  /** Paint, or erase, from one place of the brush to another. */
  stroke([fromX, fromY], [toX, toY], value) {
    const count = Math.max(1, Math.ceil(Math.hypot(toX - fromX, toY - fromY) / Math.max(0.5, $("brush").value / 4)));
    for (let i = 0; i <= count; i += 1) {
      const share = i / count;
      this.under(fromX + (toX - fromX) * share, fromY + (toY - fromY) * share).forEach((at) => { this.mask[at] = value; });
    }
  }

  listen(canvas) {
    let last = null; // where the pointer painted
    const place = (event) => {
      const { left, top, width, height } = canvas.getBoundingClientRect();
      return [((event.clientX - left) / width) * this.width, ((event.clientY - top) / height) * this.height];
    };
    const value = () => ($("erase").checked ? 0 : 1);
    canvas.addEventListener("pointerdown", (event) => {
      if (event.isPrimary && event.button === 0) {
        canvas.setPointerCapture(event.pointerId);
        this.cursor = last = place(event);
        this.repaint(() => this.stroke(last, last, value()));
      }
    });
    canvas.addEventListener("pointermove", (event) => {
      const now = place(event);
      this.cursor = now;
      this.repaint(() => last && event.isPrimary && this.stroke(last, now, value()));
      last = last && now;
    });
    for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
      canvas.addEventListener(name, (event) => {
        last = name === "pointerleave" ? last : null;
        if (event.pointerType !== "mouse" || name === "pointerleave") {
          this.cursor = null;
        }
        this.draw();
      });
    }
    canvas.addEventListener("focus", () => {
      this.cursor ??= canvas.matches(":focus-visible") ? [this.width / 2, this.height / 2] : null;
      this.draw();
    });
    canvas.addEventListener("blur", () => {
      this.cursor = null;
      if (this.bitmap !== null) {
        this.draw();
      }
    });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  /** Arrows move the brush, with Shift by its own size; Space and Enter paint; Delete and Backspace erase. */
  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const values = { " ": $("erase").checked ? 0 : 1, Enter: $("erase").checked ? 0 : 1, Delete: 0, Backspace: 0 };
    const at = this.cursor ?? [this.width / 2, this.height / 2];
    if (event.key in moves) {
      const far = event.shiftKey ? Number($("brush").value) : 1;
      this.cursor = moves[event.key].map((step, axis) => {
        return Math.min(Math.max(at[axis] + step * far, 0), axis ? this.height : this.width);
      });
    } else if (event.key in values) {
      this.cursor = at;
      this.stroke(at, at, values[event.key]);
    } else {
      return;
    }
    event.preventDefault();
    this.show();
  }
}

async function decoded(file) {
  try { // turned as its EXIF data say; its values as they are in the file
    return await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error(`${file.name} is no image that this browser reads, or is damaged; choose a PNG, JPEG or WebP file.`);
  }
}

/** A bitmap as `fit` reads it: a few rows at a time, since browsers bound the size of a canvas. */
function rowsOf(bitmap) {
  const { width, height } = bitmap;
  const read = (top, count) => {
    const canvas = new OffscreenCanvas(width, count);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, top, width, count, 0, 0, width, count);
    return context.getImageData(0, 0, width, count).data;
  };
  return { width, height, read };
}
