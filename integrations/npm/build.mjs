// Copies the page's generator, noise and worker into dist/: they are kept once, in export/page.

import { copyFileSync, mkdirSync } from "node:fs";

const root = new URL("../../", import.meta.url);
const dist = new URL("dist/", import.meta.url);
mkdirSync(dist, { recursive: true });
for (const name of ["generator.js", "noise.js", "worker.js"]) {
  copyFileSync(new URL(`export/page/${name}`, root), new URL(name, dist));
}
copyFileSync(new URL("LICENSE", root), new URL("LICENSE", dist));
