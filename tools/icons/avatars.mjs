// Options on standard input, SVGs on standard output: {"style": "personas", "avatars": [{...}, ...]} -> ["<svg ...", ...]
// Run in a folder whose node_modules holds @dicebear/core and @dicebear/<style>.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(`${process.cwd()}/`));
const load = (name) => import(pathToFileURL(require.resolve(name)).href);

const { style, avatars } = JSON.parse(readFileSync(0, "utf8"));
const { createAvatar } = await load("@dicebear/core");
const drawn = await load(`@dicebear/${style}`);
process.stdout.write(JSON.stringify(avatars.map((options) => createAvatar(drawn, options).toString())));
