/** What an image is made of. The same request gives the same noise as in Python: image `index` of `seed`. */
export interface ImageRequest {
  /** Number or name of a class; required by class-conditional students. */
  classLabel?: number | string | null;
  /** Inference steps; default: the student's own. */
  steps?: number;
  /** Below 2^64; beyond 2^53 a bigint. Default: 0. */
  seed?: number | bigint;
  index?: number | bigint;
  /** In pixels; default: the student's own size. */
  height?: number;
  width?: number;
}

/** RGBA, rows from the top: `new ImageData(image.pixels, image.width, image.height)`. */
export interface GeneratedImage {
  height: number;
  width: number;
  pixels: Uint8ClampedArray;
}

export interface GenerateOptions {
  /** Is given the clean-image estimate after every step but the last, and makes the steps run one by one. */
  onStep?: ((step: number, image: GeneratedImage) => void) | null;
  /** Ends the work before the next network call; `generate` rejects with the signal's reason. */
  signal?: AbortSignal;
}

export interface LoadOptions {
  /** An ONNX Runtime for JavaScript, such as the module onnxruntime-node; default: onnxruntime-web. */
  ort?: unknown;
  /** "wasm" (the default), "webgpu", "cpu" (the default for a given `ort` in Node), ... */
  executionProvider?: string;
  /** Counts the bytes of the graphs. */
  onProgress?: (done: number, total: number) => void;
}

export class Student {
  private constructor();
  readonly name: string;
  /** The numbers of inference steps that it supports, the default first. */
  readonly steps: number[];
  readonly numClasses: number | null;
  readonly classNames: string[] | null;
  readonly height: number;
  readonly width: number;
  /** student.json */
  readonly config: Record<string, unknown>;
  /** One image. Throws a RangeError for a request that the student does not support. */
  generate(request?: ImageRequest, options?: GenerateOptions): Promise<GeneratedImage>;
}

/** Loads the folder that `redif export --target web` wrote, from its URL (http, https, or in Node file). */
export function loadStudent(source: string | URL, options?: LoadOptions): Promise<Student>;

/** The first `count` normal numbers of (seed, index, slot), Python's bit for bit. */
export function normals(seed: bigint, index: bigint, slot: number, count: number): Float32Array;

/** Seeds and indices are below it: 2^64. */
export const SEED_LIMIT: bigint;
