// Loads a student that `redif export --target web` wrote, and makes images with it. index.d.ts describes all of it.

import { Generator } from "./dist/generator.js";
import { SEED_LIMIT } from "./dist/noise.js";

export { SEED_LIMIT, normals } from "./dist/noise.js";

export async function loadStudent(source, { ort, executionProvider, onProgress = () => {} } = {}) {
  const base = new URL(String(source).replace(/\/*$/, "/"), globalThis.location?.href);
  const response = await read(new URL("student.json", base));
  if (!response.ok) {
    throw new Error(`${base}student.json cannot be had (${response.status}); give the folder of redif export --target web`);
  }
  const config = await response.json();
  if (!Array.isArray(config.tables) || config.graphs === undefined) {
    throw new Error(`${base}student.json is not that of a student; give the folder of redif export --target web`);
  }
  const runtime = ort ?? (await import("onnxruntime-web"));
  const inNode = globalThis.process?.versions?.node !== undefined;
  const provider = executionProvider ?? (inNode && ort !== undefined ? "cpu" : "wasm");
  const generator = new Generator(config, provider, onProgress, { ort: runtime, base: base.href, read });
  await generator.load();
  return new Student(config, generator);
}

export class Student {
  #generator;

  constructor(config, generator) {
    this.name = config.name;
    this.steps = config.tables.map((table) => table.rows.length);
    this.numClasses = config.numClasses;
    this.classNames = config.classNames;
    this.height = config.latents.height * config.pixelShuffle;
    this.width = config.latents.width * config.pixelShuffle;
    this.config = config;
    this.#generator = generator;
  }

  async generate(request = {}, { onStep = null, signal } = {}) {
    const asked = this.#checked(request);
    signal?.throwIfAborted();
    const image = await this.#generator.image(asked, { onStep, cancelled: () => signal?.aborted ?? false });
    signal?.throwIfAborted();
    return image;
  }

  /** The request with defaults. Throws a RangeError that names the value and the choices. */
  #checked({ classLabel = null, steps = this.steps[0], seed = 0, index = 0, height = this.height, width = this.width }) {
    const label = typeof classLabel === "string" ? (this.classNames ?? []).indexOf(classLabel) : classLabel;
    if (this.numClasses === null && label !== null) {
      throw new RangeError(`${this.name} is unconditional; leave classLabel out`);
    }
    if (this.numClasses !== null && !(Number.isInteger(label) && label >= 0 && label < this.numClasses)) {
      const names = this.classNames === null ? "" : `, or one of ${this.classNames.slice(0, 12).join(", ")}`;
      throw new RangeError(`classLabel is ${classLabel}; give 0 to ${this.numClasses - 1}${names}`);
    }
    if (!this.steps.includes(steps)) {
      throw new RangeError(`steps is ${steps}; choose from ${this.steps.join(", ")}`);
    }
    const { dynamic = [], multiple = 1 } = this.config.latents;
    for (const [name, side, own, axis] of [["height", height, this.height, "height"], ["width", width, this.width, "width"]]) {
      const unit = multiple * this.config.pixelShuffle;
      if (side !== own && !(dynamic.includes(axis) && Number.isInteger(side) && side > 0 && side % unit === 0)) {
        throw new RangeError(`${name} is ${side}; give ${dynamic.includes(axis) ? `a multiple of ${unit}` : own}`);
      }
    }
    return { classLabel: label, steps, seed: whole(seed, "seed"), index: whole(index, "index"), height, width };
  }
}

function whole(value, name) {
  const number = typeof value === "bigint" ? value : Number.isSafeInteger(value) ? BigInt(value) : -1n;
  if (number < 0n || number >= SEED_LIMIT) {
    throw new RangeError(`${name} is ${value}; give a whole number, beyond 2^53 a BigInt, below 2^64`);
  }
  return number;
}

/** The Response of a URL; of a file: URL too, which Node's fetch does not take. */
async function read(url) {
  if (url.protocol !== "file:") {
    return fetch(url);
  }
  const { readFile } = await import(/* webpackIgnore: true */ /* @vite-ignore */ "node:fs/promises");
  try {
    return new Response(await readFile(url));
  } catch (error) {
    return new Response(null, { status: 404, statusText: error.code });
  }
}
