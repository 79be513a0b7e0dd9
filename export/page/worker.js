// The worker that computes, so that the page stays alive. It answers messages; what they mean stands beside each.

import { Generator } from "./generator.js";

let generator = null;
const cancelled = new Set(); // ids of requests that nobody waits for any more

self.onmessage = async ({ data }) => {
  try {
    if (data.type === "load") { // {config, engine, base: URL of the files; default: the worker's} -> progress..., ready {engine, threads}
      generator = new Generator(data.config, data.engine, (done, total) => {
        self.postMessage({ type: "progress", done, total });
      }, { base: data.base ?? self.location.href });
      await generator.load();
      self.postMessage({ type: "ready", engine: generator.engine, threads: generator.threads });
    } else if (data.type === "generate") { // {id, requests, previews} -> preview..., image..., done {cancelled}
      await generate(data);
    } else if (data.type === "cancel") { // {id}: no further image of that request is begun
      cancelled.add(data.id);
    }
  } catch (error) {
    self.postMessage({ type: "error", id: data.id ?? null, message: explain(error) });
  }
};

async function generate({ id, requests, previews }) {
  const gone = () => cancelled.has(id);
  for (const [place, request] of requests.entries()) {
    const start = performance.now();
    const onStep = previews ? (step, image) => post("preview", image, { id, place, step }) : null;
    const image = await generator.image(request, { onStep, cancelled: gone });
    if (image === null) {
      break;
    }
    post("image", image, { id, place, seconds: (performance.now() - start) / 1000 });
    await new Promise((resolve) => setTimeout(resolve)); // let a cancellation in
  }
  self.postMessage({ type: "done", id, cancelled: gone() });
  cancelled.delete(id);
}

function post(type, image, more) {
  self.postMessage({ type, ...more, ...image }, [image.pixels.buffer]);
}

/** An engine's error in a sentence. Its own numbers, which some builds throw, mean that memory ran out. */
function explain(error) {
  if (typeof error === "number" || error instanceof RangeError) {
    return "There is not enough memory for this in the browser.";
  }
  return error instanceof Error ? error.message : String(error);
}
