// A student in the browser: its graphs by ONNX Runtime Web, its noise by noise.js, its steps by its own tables.
// The npm package (integrations/npm) is made of this file, too; there the engine is given, also ONNX Runtime for Node.
//
// The arithmetic is that of redif_sdk/sampling/table.py, redif_sdk/drawing.py and redif_sdk/images.py. Nothing here
// touches the page.

import { normals } from "./noise.js";

/** "hardware", "software" or "none": the WebGPU that answers in this browser. WASM is far faster than one in software. */
async function webGpu() {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    const emulated = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter ?? false;
    return adapter ? (emulated ? "software" : "hardware") : "none";
  } catch {
    return "none";
  }
}

export class Generator {
  /**
   * `config` is student.json; `engine` is "auto", "wasm" or "webgpu"; `onProgress(done, total)` counts bytes.
   * `base` is the URL that files are relative to, `read(url)` their Response. With `ort`, an ONNX Runtime for
   * JavaScript, `engine` is one of its execution providers. `load` throws an Error whose message is for people.
   */
  constructor(config, engine, onProgress, { ort = null, base = globalThis.location?.href, read = fetch } = {}) {
    this.config = config;
    this.given = ort;
    this.base = base;
    this.read = read;
    this.wanted = engine;
    this.onProgress = onProgress;
    this.sessions = new Map(); // component -> promise of a session
  }

  async load() {
    if (this.given !== null) {
      this.ort = this.given;
      this.engine = this.wanted;
      await this.session(this.main());
      return;
    }
    const found = this.wanted !== "wasm" && this.config.engines.webgpu ? await webGpu() : "none";
    const gpu = found === "hardware" || (found === "software" && this.wanted === "webgpu");
    if (this.wanted === "webgpu" && !gpu) {
      throw new Error("This browser has no WebGPU that answers; choose WASM.");
    }
    this.engine = gpu ? "webgpu" : "wasm";
    await this.open();
    if (this.engine === "webgpu" && this.wanted === "auto") {
      try {
        await this.session(this.main());
      } catch (error) {
        console.warn("WebGPU does not take this student; WASM does it:", error);
        this.sessions.clear();
        this.engine = "wasm";
        await this.open();
      }
    }
    await this.session(this.main());
  }

  async open() {
    this.ort = await import(new URL(this.config.engines[this.engine], this.base).href);
    this.threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
    this.ort.env.wasm.numThreads = this.threads;
    this.ort.env.wasm.wasmPaths = new URL("ort/", this.base).href;
    this.ort.env.logLevel = "error";
  }

  /** The graph that a plain call runs. */
  main() {
    return this.config.graphs.generator ? "generator" : "denoiser";
  }

  /** The session of "generator" or "denoiser", made when it is first asked for. */
  session(component) {
    if (!this.sessions.has(component)) {
      const made = this.create(component);
      made.catch(() => this.sessions.delete(component)); // the next call tries again
      this.sessions.set(component, made);
    }
    return this.sessions.get(component);
  }

  async create(component) {
    const graph = this.config.graphs[component];
    const all = [graph, ...graph.data];
    const total = all.reduce((sum, file) => sum + file.bytes, 0);
    let before = 0;
    const bytes = [];
    for (const file of all) {
      bytes.push(await fetchChecked(file, this.base, this.read, (done) => this.onProgress(before + done, total)));
      before += file.bytes;
    }
    const options = { executionProviders: [this.engine], graphOptimizationLevel: "all", logSeverityLevel: 3 };
    if (graph.data.length > 0) {
      options.externalData = graph.data.map((file, i) => ({ path: file.name, data: bytes[i + 1] }));
    }
    return this.ort.InferenceSession.create(bytes[0], options);
  }

  /**
   * One image: {height, width, channels, pixels}, RGBA. `request` has classLabel (a number, or null), steps, seed and
   * index (BigInt), height and width (pixels), and begin: null, or {levels, mask, steps}, the image to start from
   * (H, W, C), where it is painted anew (H, W; null: everywhere), and the table's last rows that are run. `onStep(step,
   * image)` is given the clean-image estimate after every step but the last, and makes the steps run one by one.
   * `cancelled()` is asked before every network call; null comes back.
   */
  async image(request, { onStep = null, cancelled = () => false } = {}) {
    const { latents, pixelShuffle } = this.config;
    const table = this.config.tables.find((each) => each.rows.length === request.steps);
    const begin = request.begin ?? null;
    const first = begin === null ? 0 : table.rows.length - begin.steps;
    const rows = table.rows.slice(first);
    const shape = [1, latents.channels, request.height / pixelShuffle, request.width / pixelShuffle];
    const size = shape[1] * shape[2] * shape[3];
    const slices = rows.some((row) => row[5] !== 0) ? rows.length + 1 : 1;
    const noise = new Float32Array(slices * size);
    for (let slot = 0; slot < slices; slot += 1) {
      noise.set(normals(request.seed, request.index, slot, size), slot * size);
    }
    const known = begin === null ? null : this.known(begin, noise.slice(0, size), shape, table.levels.slice(first));
    if (known !== null) {
      noise.set(known.at(0));
    }
    if (cancelled()) {
      return null;
    }
    const drawing = { noise, slices, shape, rows, initScale: known === null ? table.initScale : 1 };
    if (onStep === null && !known?.kept && this.config.graphs.generator) {
      return this.fused(drawing, request.classLabel);
    }
    return this.stepped(drawing, known, request.classLabel, onStep, cancelled);
  }

  /**
   * The image that is started from: `at(k)` is it at the noise level that row k begins with, after the last row without
   * noise, and `kept` holds 1 where it stays as it is; null: nowhere.
   */
  known({ levels, mask }, noise, shape, noiseLevels) {
    const round = Math.fround;
    const [scale, offset] = [round(this.config.scale), round(this.config.offset)];
    const order = this.order(shape);
    const channels = shape[1] / this.config.pixelShuffle ** 2;
    const latents = new Float32Array(order.length);
    const kept = mask === null ? null : new Uint8Array(order.length);
    for (let i = 0; i < order.length; i += 1) {
      latents[order[i]] = round(levels[i] - offset) / scale;
      if (kept !== null) {
        kept[order[i]] = mask[Math.floor(i / channels)] ? 0 : 1;
      }
    }
    const at = (row) => {
      const [alpha, sigma] = noiseLevels[row] ?? [1, 0];
      return latents.map((value, i) => round(alpha * value) + round(sigma * noise[i]));
    };
    return { at, kept };
  }

  async fused({ noise, slices, shape, rows, initScale }, classLabel) {
    const { Tensor } = this.ort;
    const session = await this.session("generator");
    const inputs = {
      noise: new Tensor("float32", noise, [slices, ...shape]),
      table: new Tensor("float32", Float32Array.from(rows.flat()), [rows.length, 6]),
      init_scale: new Tensor("float32", Float32Array.of(initScale), []),
      ...this.label(classLabel),
    };
    const { images } = await session.run(inputs);
    const [, height, width, channels] = images.dims;
    return { height, width, channels, pixels: rgba(await images.getData(), channels) };
  }

  async stepped({ noise, shape, rows, initScale }, known, classLabel, onStep, cancelled) {
    const { Tensor } = this.ort;
    const round = Math.fround;
    const session = await this.session("denoiser");
    const size = shape[1] * shape[2] * shape[3];
    const last = rows.length - 1;
    let x = Float32Array.from(noise.subarray(0, size), (value) => value * round(initScale));
    for (let k = 0; k <= last; k += 1) {
      if (cancelled()) {
        return null;
      }
      const [t, p, q, r, s, c] = rows[k];
      const { f } = await session.run({
        sample: new Tensor("float32", x, shape),
        timestep: new Tensor("float32", Float32Array.of(t), [1]),
        ...this.label(classLabel),
      });
      const output = await f.getData();
      const clean = new Float32Array(size);
      const next = new Float32Array(size);
      const z = (k + 1) * size;
      for (let i = 0; i < size; i += 1) { // every product and sum rounded to float32, as numpy does
        clean[i] = round(p * x[i]) + round(q * output[i]);
        const mean = round(round(r * clean[i]) + round(s * x[i]));
        next[i] = c === 0 ? mean : mean + round(c * noise[z + i]);
      }
      if (known?.kept) {
        const there = known.at(k + 1);
        known.kept.forEach((kept, i) => { next[i] = kept ? there[i] : next[i]; });
      }
      x = next;
      if (k < last && onStep !== null) {
        onStep(k, this.develop(clean, shape));
        await new Promise((resolve) => setTimeout(resolve)); // let a cancellation in
      }
    }
    return this.develop(x, shape);
  }

  /** Latents (1, C, H, W) to an image: torch's pixel shuffle, the value range to 0..255, rounded half to even. */
  develop(x, shape) {
    const { pixelShuffle: factor, scale, offset } = this.config;
    const levels = Uint8Array.from(this.order(shape), (place) => {
      const level = Math.fround(Math.fround(x[place] * Math.fround(scale)) + Math.fround(offset));
      return halfToEven(Math.min(Math.max(level, 0), 255));
    });
    const channels = shape[1] / factor ** 2;
    return { height: shape[2] * factor, width: shape[3] * factor, channels, pixels: rgba(levels, channels) };
  }

  /** Of each value of an image (H, W, C) its place in the latents (1, C', H', W'): torch's pixel shuffle. */
  order(shape) {
    const factor = this.config.pixelShuffle;
    const channels = shape[1] / factor ** 2;
    const height = shape[2] * factor;
    const width = shape[3] * factor;
    const places = new Uint32Array(height * width * channels);
    for (let row = 0; row < height; row += 1) {
      for (let column = 0; column < width; column += 1) {
        const inside = (row % factor) * factor + (column % factor);
        const place = Math.floor(row / factor) * shape[3] + Math.floor(column / factor);
        for (let channel = 0; channel < channels; channel += 1) {
          const plane = channel * factor ** 2 + inside;
          places[(row * width + column) * channels + channel] = plane * shape[2] * shape[3] + place;
        }
      }
    }
    return places;
  }

  /** The graph's inputs for a class. Guided, the network is called for it and for 'no class', in one batch of rows. */
  label(classLabel) {
    if (classLabel === null) {
      return {};
    }
    const int64 = (numbers) => new this.ort.Tensor("int64", numbers.map(BigInt), [numbers.length]);
    const { guidance } = this.config;
    if (guidance === null) {
      return { class_labels: int64([classLabel]) };
    }
    const guided = guidance.scale > 1;
    return {
      class_labels: int64(guided ? [classLabel, guidance.nullClass] : [classLabel]),
      guidance_rows: int64(guided ? [0, 0] : [0]),
      null_rows: int64(guided ? [1] : [0]),
      guidance_scale: new this.ort.Tensor("float32", Float32Array.of(guidance.scale), [1]),
    };
  }
}

/** The bytes of a file of student.json. Throws unless they are the very ones that were exported. */
async function fetchChecked(file, base, read, onProgress) {
  const response = await read(new URL(file.file, base));
  if (!response.ok) {
    throw new Error(`${file.file} cannot be had: the server answers ${response.status}. Publish the whole folder.`);
  }
  const bytes = new Uint8Array(file.bytes);
  let done = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done: ended, value } = await reader.read();
    if (ended) {
      break;
    }
    if (done + value.length > file.bytes) {
      throw new Error(`${file.file} is longer than it was when this page was made. Publish the folder again.`);
    }
    bytes.set(value, done);
    done += value.length;
    onProgress(done);
  }
  if (done !== file.bytes) {
    throw new Error(`${file.file} came incomplete: ${done} of ${file.bytes} bytes. Load the page again.`);
  }
  if (globalThis.crypto?.subtle) { // a page that comes over plain HTTP from another machine has none
    const digest = new Uint8Array(await globalThis.crypto.subtle.digest("SHA-256", bytes));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (hex !== file.sha256) {
      throw new Error(`${file.file} is not what was exported: its SHA-256 differs. Publish the folder again.`);
    }
  }
  return bytes;
}

function halfToEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) {
    return rest < 0.5 ? below : below + 1; // NaN fails every comparison and becomes 0 in the array
  }
  return below % 2 === 0 ? below : below + 1;
}

/** Levels (H, W, C) with C = 1, 3 or 4 to RGBA. */
function rgba(levels, channels) {
  const pixels = new Uint8ClampedArray((levels.length / channels) * 4);
  for (let from = 0, to = 0; from < levels.length; from += channels, to += 4) {
    pixels[to] = levels[from];
    pixels[to + 1] = levels[from + (channels > 2 ? 1 : 0)];
    pixels[to + 2] = levels[from + (channels > 2 ? 2 : 0)];
    pixels[to + 3] = channels === 4 ? levels[from + 3] : 255;
  }
  return pixels;
}
