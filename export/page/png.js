// Images as PNG files that say that they were generated, and by what: the mark of redif_sdk/marks/xmp.py.

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const COLOURS = { 1: 0, 3: 2, 4: 6 }; // channels -> PNG's colour type
const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  let value = n;
  for (let bit = 0; bit < 8; bit += 1) {
    value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  }
  return value;
});

/** A PNG of images of one size, side by side in `columns`; `marks` are their marks in JSON, none where there are none. */
export async function png(images, columns, packet, marks) {
  const { height, width, channels } = images[0];
  const rows = Math.ceil(images.length / columns);
  const stride = 1 + columns * width * channels; // before each row its filter: 0, none
  const bytes = new Uint8Array(rows * height * stride);
  images.forEach(({ pixels }, place) => {
    const [top, left] = [Math.floor(place / columns) * height, (place % columns) * width];
    for (let i = 0; i < height * width; i += 1) {
      const at = (top + Math.floor(i / width)) * stride + 1 + (left + (i % width)) * channels;
      bytes.set(pixels.subarray(i * 4, i * 4 + channels), at);
    }
  });
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, columns * width);
  header.setUint32(4, rows * height);
  header.setUint8(8, 8); // bits
  header.setUint8(9, COLOURS[channels]);
  const data = new Response(new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate")));
  const parts = [Uint8Array.from(SIGNATURE), chunk("IHDR", new Uint8Array(header.buffer))];
  if (packet !== null && marks.length > 0) {
    parts.push(chunk("iTXt", new TextEncoder().encode(`XML:com.adobe.xmp\0\0\0\0\0${filled(packet, marks)}`)));
  }
  parts.push(chunk("IDAT", new Uint8Array(await data.arrayBuffer())), chunk("IEND", new Uint8Array(0)));
  return new Blob(parts, { type: "image/png" });
}

/** What made an image, as JSON. Seeds are BigInt: JSON's numbers have as many digits as they need. */
export function markOf({ name, digest, precision }, { classLabel, steps, seed, index, height, width, begin }) {
  const mark = { student: name, digest, precision, num_inference_steps: steps, height, width };
  if (begin) {
    mark.begins_with = begin.mask === null ? "image" : "mask";
  }
  const label = classLabel === null ? "" : `,"class_label":${classLabel}`;
  return `${JSON.stringify(mark).slice(0, -1)},"seed":${seed},"index":${index}${label}}`;
}

function filled(packet, marks) {
  const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;" };
  const made = `[${marks.join(",")}]`
    .replace(/[\u007f-\uffff]/g, (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`)
    .replace(/[&<>"']/g, (letter) => escapes[letter]);
  return packet.replace("{made}", () => made);
}

function chunk(type, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(data, 8);
  let crc = 0xffffffff;
  for (const byte of bytes.subarray(4, 8 + data.length)) {
    crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  }
  view.setUint32(8 + data.length, ~crc >>> 0);
  return bytes;
}
