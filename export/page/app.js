// The page: reads the form and the address, asks the worker, and shows what comes. No image is computed here.

import { Editor } from "./editor.js";
import { SEED_LIMIT } from "./noise.js";
import { markOf, png } from "./png.js";

const $ = (id) => document.getElementById(id);
const SMALL = 128; // pixels: smaller images are shown with hard edges
const MOST_SHOWN = 512;

let config = null;
let editor = null; // of the image that is started from
let worker = null;
let ready = false;
let running = null; // {id, requests, start, made} of the request under way
let lastId = 0;
let checking = null; // what to do with the images of the check
const shown = []; // {request, canvas, item, strip, image, seconds}, in the order of the gallery
let viewed = -1;

start().catch((error) => fail(error.message));

async function start() {
  say("Loading");
  const response = await fetch("student.json");
  if (!response.ok) {
    throw new Error(`student.json cannot be had: the server answers ${response.status}. Publish the whole folder.`);
  }
  config = await response.json();
  fillForm();
  fillFacts();
  readAddress();
  connect();
  addEventListener("hashchange", () => {
    if (readAddress() && ready && !running) {
      editor.remove(); // a link names images from noise
      generate();
    }
  });
}

// ---------------------------------------------------------------- the worker

function connect() {
  worker?.terminate();
  ready = false;
  if (running) {
    settle("Stopped: the engine was changed.");
  }
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => answers[data.type](data);
  worker.onerror = (event) => fail(event.message || "The worker of this page did not start.");
  worker.postMessage({ type: "load", config, engine: $("engine").value });
  buttons();
}

const answers = {
  progress({ done, total }) {
    $("progress").hidden = done === total;
    $("progress").value = done / total;
    if (!running) {
      say(`Loading the model: ${megabytes(done)} of ${megabytes(total)}`);
    }
  },
  ready({ engine, threads }) {
    ready = true;
    $("progress").hidden = true;
    const where = engine === "webgpu" ? "WebGPU" : threads > 1 ? `WASM, ${threads} threads` : "WASM";
    fact("Engine", `ONNX Runtime Web ${config.runtime}, ${where}`);
    say(`Ready (${where})`);
    buttons();
    if (addressAsks) {
      addressAsks = false;
      generate();
    }
  },
  preview({ id, place, step, ...image }) {
    if (running?.id === id && !checking) {
      const entry = entryOf(place);
      entry.strip.push(image);
      paint(entry.canvas, image);
      entry.item.classList.add("forming");
      entry.note.textContent = `step ${step + 1} of ${entry.request.steps}`;
    }
  },
  image({ id, place, seconds, ...image }) {
    if (running?.id !== id) {
      return;
    }
    running.made += 1;
    if (checking) {
      checking(place, image);
      return;
    }
    const entry = entryOf(place);
    entry.image = image;
    entry.seconds = seconds;
    paint(entry.canvas, image);
    entry.item.classList.remove("forming");
    entry.note.textContent = caption(entry.request);
    entry.button.disabled = false;
    entry.button.setAttribute("aria-label", `Open ${caption(entry.request)}`);
    say(`${running.made} of ${running.requests.length}`);
    $("progress").hidden = false;
    $("progress").value = running.made / running.requests.length;
  },
  done({ id, cancelled }) {
    if (running?.id === id) {
      const seconds = (performance.now() - running.start) / 1000;
      const made = `${running.made} ${running.made === 1 ? "image" : "images"} in ${duration(seconds)}`;
      const rate = running.made > 0 ? `, ${(running.made / seconds).toPrecision(3)} a second` : "";
      settle(cancelled ? `Cancelled: ${made}.` : `${made}${rate}.`);
    }
  },
  error({ message }) {
    fail(message);
  },
};

/** End the request under way; what did not come is taken away. */
function settle(message) {
  running = null;
  checking = null;
  for (let i = shown.length - 1; i >= 0; i -= 1) {
    if (!shown[i].image) {
      shown[i].item.remove();
      shown.splice(i, 1);
    }
  }
  $("progress").hidden = true;
  say(message);
  buttons();
}

function fail(message) {
  settle(ready ? "That did not work." : "This page cannot work.");
  complain(message);
}

function complain(message) {
  $("error").textContent = message;
  $("error").hidden = message === null;
}

// ---------------------------------------------------------------- requests

function generate() {
  complain(null);
  let requests;
  try {
    requests = readForm();
  } catch (error) {
    complain(error.message);
    return;
  }
  while (shown.length > 0 && shown.length + requests.length > MOST_SHOWN) {
    shown.pop().item.remove();
  }
  const entries = requests.map(makeEntry);
  shown.unshift(...entries);
  $("gallery").prepend(...entries.map((entry) => entry.item));
  const named = requests[0].begin === null ? `#${address(requests[0], requests.length)}` : location.pathname + location.search;
  history.replaceState(null, "", named); // an address holds no image to start from
  send(requests, entries, $("previews").checked);
}

function send(requests, entries, previews) {
  lastId += 1;
  running = { id: lastId, requests, entries, made: 0, start: performance.now() };
  say("Generating");
  buttons();
  worker.postMessage({ type: "generate", id: lastId, requests, previews });
}

/** The requests that the form asks for, one for each image. Throws an Error that says what to change. */
function readForm() {
  const count = whole($("count").value, "Images", 1, 64);
  if ($("random").checked) {
    $("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  }
  const [seed, index] = readSeed($("seed").value);
  if (index + BigInt(count) > SEED_LIMIT) {
    throw new Error("The seed's images end at index 2^64 - 1: ask for fewer.");
  }
  const classLabel = readClass();
  const [height, width] = ["height", "width"].map(readExtent);
  const steps = Number($("steps").value);
  const begin = editor.begin();
  return Array.from({ length: count }, (_, i) => ({
    classLabel, steps, seed, index: index + BigInt(i), height, width, begin,
  }));
}

function readSeed(text) {
  const match = /^\s*(\d{1,20})(?::(\d{1,20}))?\s*$/.exec(text);
  const parts = match ? [BigInt(match[1]), BigInt(match[2] ?? "0")] : [];
  if (!match || parts.some((part) => part >= SEED_LIMIT)) {
    throw new Error(`The seed is "${text.slice(0, 40)}"; give a whole number below 2^64, as in 7, or 7:2.`);
  }
  return parts;
}

function readClass() {
  if (config.numClasses === null) {
    return null;
  }
  if (!$("class-select").hidden) {
    return Number($("class-select").value);
  }
  const text = $("class-input").value.trim();
  const named = classNumber(text);
  if (named === null) {
    throw new Error(`"${text.slice(0, 40)}" is not a class of this model; choose one from the list.`);
  }
  return named;
}

/** A class by its name, or by its number; null for neither. */
function classNumber(text) {
  const names = config.classNames ?? [];
  const found = names.findIndex((name) => name.toLowerCase() === text.toLowerCase());
  const number = /^\d{1,7}$/.test(text) ? Number(text) : -1;
  return found >= 0 ? found : number >= 0 && number < config.numClasses ? number : null;
}

function readExtent(axis) {
  const unit = config.latents.multiple * config.pixelShuffle;
  const own = config.latents[axis] * config.pixelShuffle;
  if (!config.latents.dynamic.includes(axis)) {
    return own;
  }
  const value = whole($(axis).value, axis === "height" ? "Height" : "Width", unit, 4096);
  if (value !== own && value % unit !== 0) {
    throw new Error(`${axis === "height" ? "Height" : "Width"} is ${value}; give a multiple of ${unit}.`);
  }
  return value;
}

function whole(text, name, least, most) {
  const value = /^\d{1,6}$/.test(text.trim()) ? Number(text) : NaN;
  if (!(value >= least && value <= most)) {
    throw new Error(`${name} is "${text.slice(0, 20)}"; give a whole number from ${least} to ${most}.`);
  }
  return value;
}

// ---------------------------------------------------------------- the address

let addressAsks = false; // whether the address names an image that is to be made when the model is there

/** What follows # of the address of these images. */
function address(request, count) {
  const parts = new URLSearchParams();
  if (request.classLabel !== null) {
    parts.set("class", config.classNames?.[request.classLabel] ?? String(request.classLabel));
  }
  parts.set("steps", String(request.steps));
  parts.set("seed", request.index > 0n ? `${request.seed}:${request.index}` : String(request.seed));
  parts.set("n", String(count));
  for (const axis of config.latents.dynamic) {
    parts.set(axis, String(request[axis]));
  }
  return parts.toString();
}

/** Put what the address says into the form; whether it asks for images. */
function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const label = parts.has("class") && config.numClasses !== null ? classNumber(parts.get("class")) : null;
  if (label !== null) {
    $("class-select").value = String(label);
    $("class-input").value = config.classNames?.[label] ?? String(label);
  }
  if (config.tables.some((table) => String(table.rows.length) === parts.get("steps"))) {
    $("steps").value = parts.get("steps");
  }
  for (const [key, id] of [["seed", "seed"], ["n", "count"], ["height", "height"], ["width", "width"]]) {
    if (parts.has(key)) {
      $(id).value = parts.get(key);
    }
  }
  addressAsks = parts.has("seed");
  if (addressAsks) {
    $("random").checked = false;
  }
  return addressAsks;
}

// ---------------------------------------------------------------- the gallery

function makeEntry(request) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const canvas = document.createElement("canvas");
  const note = document.createElement("p");
  canvas.className = "empty";
  button.type = "button";
  button.disabled = true;
  button.append(canvas);
  item.append(button, note);
  const entry = { request, item, button, canvas, note, strip: [], image: null, seconds: null };
  button.addEventListener("click", () => view(shown.indexOf(entry)));
  return entry;
}

function entryOf(place) {
  return running.entries[place];
}

function paint(canvas, { height, width, pixels }) {
  canvas.height = height;
  canvas.width = width;
  canvas.className = Math.max(height, width) < SMALL ? "small" : "";
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
}

function caption({ classLabel, seed, index, begin }) {
  const label = classLabel === null ? "" : `${config.classNames?.[classLabel] ?? classLabel}, `;
  return `${label}seed ${seed}${index > 0n ? `:${index}` : ""}${begin ? ", from an image" : ""}`;
}

function fileName({ classLabel, seed, index, steps }) {
  const label = classLabel === null ? "" : `-${config.classNames?.[classLabel] ?? classLabel}`;
  return `${config.name}${label}-steps-${steps}-seed-${seed}-${index}`.replace(/[^A-Za-z0-9._-]+/g, "_") + ".png";
}

function view(place) {
  if (place < 0 || place >= shown.length || !shown[place].image) {
    return;
  }
  viewed = place;
  const { request, image, strip, seconds } = shown[place];
  $("viewer-title").textContent =
    `${caption(request)}, ${request.steps} ${request.steps === 1 ? "step" : "steps"}, ${duration(seconds)}`;
  paint($("large"), image);
  const frames = strip.length > 0 ? [...strip, image] : [];
  $("strip").hidden = frames.length === 0;
  $("strip").replaceChildren(...frames.map((frame, step) => {
    const item = document.createElement("li");
    const canvas = document.createElement("canvas");
    paint(canvas, frame);
    item.append(canvas, `step ${step + 1}`);
    return item;
  }));
  URL.revokeObjectURL($("save").href);
  $("save").removeAttribute("href"); // until this image is encoded: the one before must not be saved under its name
  png([image], 1, config.mark, [markOf(config, request)]).then((blob) => {
    if (viewed === place) {
      $("save").href = URL.createObjectURL(blob);
      $("save").download = fileName(request);
    }
  });
  $("previous").disabled = place === 0;
  $("next").disabled = !shown[place + 1]?.image;
  if (!$("viewer").open) {
    $("viewer").showModal();
  }
}

/** All images of the gallery that have the first one's size, on one sheet. */
async function sheet() {
  const made = shown.filter((entry) => entry.image);
  const { height, width } = made[0].image;
  const same = made.filter(({ image }) => image.height === height && image.width === width);
  const marks = same.map(({ request }) => markOf(config, request));
  const columns = Math.ceil(Math.sqrt(same.length));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await png(same.map(({ image }) => image), columns, config.mark, marks));
  link.download = `${config.name}.png`.replace(/[^A-Za-z0-9._-]+/g, "_");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// ---------------------------------------------------------------- the check

/** Make what was recorded at export, and say by how much it differs. */
function verify() {
  complain(null);
  $("verified").textContent = "";
  const requests = config.check.map((each) => ({
    ...each.request, seed: BigInt(each.request.seed), index: BigInt(each.request.index),
  }));
  const largest = [];
  checking = (place, { pixels }) => {
    const recorded = Uint8Array.from(atob(config.check[place].pixels), (letter) => letter.charCodeAt(0));
    const channels = recorded.length / (pixels.length / 4);
    let difference = recorded.length > 0 ? 0 : NaN;
    for (let i = 0; i < recorded.length; i += 1) {
      const at = Math.floor(i / channels) * 4 + (i % channels);
      difference = Math.max(difference, Math.abs(recorded[i] - pixels[at]));
    }
    largest.push(difference);
    if (largest.length === requests.length) {
      const most = Math.max(...largest);
      $("verified").dataset.largest = String(most);
      $("verified").textContent = most <= 1
        ? `${largest.length} recorded images: no value is more than ${most} of 255 off. This browser makes the right images.`
        : `${largest.length} recorded images: some values are ${most} of 255 off. This browser does not make the right images; try the other engine.`;
    }
  };
  send(requests, [], false);
}

// ---------------------------------------------------------------- the form

function fillForm() {
  document.title = config.name;
  $("name").textContent = config.name;
  if (config.numClasses !== null) {
    $("class-field").hidden = false;
    const names = config.classNames ?? Array.from({ length: Math.min(config.numClasses, 1000) }, (_, i) => String(i));
    const listed = names.length <= 200 && names.length === config.numClasses;
    $("class-select").hidden = !listed;
    $("class-input").hidden = listed;
    const options = names.map((name, i) => new Option(name, listed ? String(i) : name));
    (listed ? $("class-select") : $("class-list")).replaceChildren(...options);
    $("class-input").value = names[0];
  }
  $("steps").replaceChildren(...config.tables.map((table) => new Option(table.rows.length, table.rows.length)));
  $("size-fields").hidden = config.latents.dynamic.length === 0;
  for (const axis of ["height", "width"]) {
    $(axis).value = config.latents[axis] * config.pixelShuffle;
    $(axis).disabled = !config.latents.dynamic.includes(axis);
  }
  $("previews-field").hidden = !config.graphs.denoiser || config.tables.every((table) => table.rows.length === 1);
  $("previews").checked = config.previews && !$("previews-field").hidden;
  $("engine").querySelector('[value="webgpu"]').disabled = !config.engines.webgpu;
  editor = new Editor(config, {
    size: () => ["height", "width"].map(readExtent),
    steps: () => Number($("steps").value),
    onSize: (axis, value) => { $(axis).value = value; },
    onError: complain,
  });
  $("form").noValidate = true; // the messages are ours, and say what to do
}

function fillFacts() {
  const steps = config.tables.map((table) => table.rows.length).join(", ");
  fact("Steps", steps);
  fact("Licence", config.licence);
  if (config.teacher) {
    fact("Teacher", `${config.teacher.id}, ${config.teacher.num_inference_steps} steps`);
  }
  if (config.method) {
    fact("Method", config.method);
  }
  fact("Weights", `${megabytes(config.graphs[config.graphs.generator ? "generator" : "denoiser"].bytes)}, ${config.precision}`);
  fact("Made by", config.madeBy);
}

function fact(name, value) {
  const old = [...$("facts").querySelectorAll("dt")].find((term) => term.textContent === name);
  if (old) {
    old.nextElementSibling.textContent = value;
    return;
  }
  const term = document.createElement("dt");
  const detail = document.createElement("dd");
  term.textContent = name;
  detail.textContent = value;
  $("facts").append(term, detail);
}

function buttons() {
  $("generate").disabled = !ready || running !== null;
  $("verify").disabled = !ready || running !== null || config.check.length === 0;
  $("cancel").disabled = running === null;
  $("tools").hidden = running !== null || shown.length === 0;
  $("share").hidden = Boolean(shown[0]?.request.begin);
}

function say(text) {
  $("status").textContent = text;
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

function duration(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toPrecision(3)} s`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (ready && !running) {
    generate();
  }
});
$("cancel").addEventListener("click", () => {
  if (running) {
    say("Cancelling");
    worker.postMessage({ type: "cancel", id: running.id });
  }
});
$("clear").addEventListener("click", () => {
  shown.length = 0;
  $("gallery").replaceChildren();
  say("Ready");
  buttons();
});
$("share").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    say("The link is copied; it makes the same images wherever it is opened.");
  } catch {
    say("This browser does not let the page copy; the link is the page's address.");
  }
});
$("sheet").addEventListener("click", sheet);
$("steps").addEventListener("change", () => editor.show());
for (const axis of ["height", "width"]) {
  $(axis).addEventListener("change", () => {
    try {
      editor.resize();
    } catch (error) {
      complain(error.message);
    }
  });
}
$("verify").addEventListener("click", verify);
$("engine").addEventListener("change", connect);
$("previous").addEventListener("click", () => view(viewed - 1));
$("next").addEventListener("click", () => view(viewed + 1));
$("close").addEventListener("click", () => $("viewer").close());
$("viewer").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    view(viewed + (event.key === "ArrowLeft" ? -1 : 1));
  }
});
