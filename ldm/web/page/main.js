import { build, element } from "./form.js";
import { gallery } from "./gallery.js";
import { painter } from "./paint.js";
import * as server from "./stream.js";

const at = (id) => document.getElementById(id);
const [status, shown, progress, notices] = ["status", "shown", "progress", "notices"].map(at);

function say(text, wrong = false) {
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

function tell(sentences) {
  notices.replaceChildren(...sentences.map((each) => element("li", {}, each)));
}

const paint = painter(at("begin"));
let form, pictures;
let running = null; // an AbortController while a job is asked for

// ---------------------------------------------------------------- drawing

async function draw() {
  if (running) return;
  const job = form.read();
  running = new AbortController();
  busy(true);
  at("stage").scrollIntoView({ block: "nearest" }); // on a narrow screen it is below the form
  tell([]);
  say("asking");
  let drawn = 0;
  try {
    const files = await paint.files();
    for await (const event of server.draw(job, files, running.signal)) {
      if (event.event === "place") say(event.ahead === 1 ? "one is in front" : `${event.ahead} are in front`);
      if (event.event === "walked") {
        progress.value = event.step / event.steps;
        const last = event.first + event.count;
        const which = (job.n || 1) > 1 ? `, pictures ${event.first + 1} to ${last} of ${job.n}` : "";
        say(`step ${event.step} of ${event.steps}${which}`);
        if (event.previews.length) preview(event.previews.map((each) => server.blob(each, "image/jpeg")));
      }
      if (event.event === "drawn") {
        drawn += 1;
        const settings = { ...job, seed: event.seed };
        delete settings.n;
        const words = event.words.map(([word, map]) => [word, server.blob(map, "image/png")]);
        const entry = { png: server.blob(event.png, "image/png"), settings, files, words };
        await pictures.add(entry);
        at("empty").hidden = true;
        show(entry);
      }
      if (event.event === "done") {
        say(`${drawn === 1 ? "drawn" : `${drawn} drawn`} in ${event.seconds} s`);
        tell(event.notices);
      }
      if (event.event === "error") throw new Error(event.error);
    }
  } catch (error) {
    if (error.name === "AbortError") say("cancelled");
    else say(error.message, true);
    for (const each of shown.querySelectorAll(".preview")) each.remove();
  } finally {
    running = null;
    busy(false);
  }
}

function busy(now) {
  at("draw").disabled = now;
  at("cancel").disabled = !now;
  progress.hidden = !now;
  progress.value = 0;
  shown.setAttribute("aria-busy", now);
}

function clear() {
  shown.replaceChildren();
}

function preview(blobs) {
  clear();
  for (const each of blobs) {
    const picture = element("img", { className: "preview", alt: "a preview", src: URL.createObjectURL(each) });
    picture.addEventListener("load", () => URL.revokeObjectURL(picture.src));
    shown.append(picture);
  }
}

// ---------------------------------------------------------------- one picture, and what to do with it

function show(entry) {
  clear();
  const { settings, png } = entry;
  const address = entry.node.querySelector("img").src;
  const name = `${(settings.prompt || "picture").replace(/[^\w]+/g, "-").slice(0, 40)}-${settings.seed}.png`;
  const act = (text, work) => {
    const button = element("button", { type: "button", className: "quiet" }, text);
    button.addEventListener("click", work);
    return button;
  };
  const use = act("Use its settings", async () => {
    form.write(settings);
    const { image, mask } = entry.files;
    if (image) await begin(image, mask);
    else paint.close();
    say("its settings are in the form");
  });
  const again = act("Begin from it", () => begin(png));
  const remove = act("Remove", () => {
    pictures.remove(entry);
    clear();
    at("stage").focus();
  });
  const save = element("a", { className: "button quiet", href: address, download: name }, "Save");
  shown.append(
    element(
      "figure",
      {},
      element("div", { className: "looked" }, element("img", { src: address, alt: settings.prompt || "the picture" })),
      ...attention(entry.words || []),
      element("figcaption", {}, element("span", { className: "caption" }, settings.prompt || ""), ` seed ${settings.seed}`),
      element("div", { className: "buttons" }, use, again, save, remove),
    ),
  );
  for (const each of document.querySelectorAll("#gallery [aria-current]")) each.removeAttribute("aria-current");
  entry.node.querySelector("button").setAttribute("aria-current", "true");
}

// A button for each word, which darkens the picture where the network does not look at it.
function attention(words) {
  if (!words.length) return [];
  const buttons = words.map(([word, map]) => {
    const button = element("button", { type: "button", className: "quiet", ariaPressed: "false" }, word);
    button.addEventListener("click", () => {
      const on = button.ariaPressed === "true";
      for (const each of shown.querySelectorAll(".heat")) each.remove();
      for (const each of buttons) each.ariaPressed = "false";
      if (on) return;
      button.ariaPressed = "true";
      const heat = element("img", { className: "heat", alt: `where it looks at ${word}`, src: URL.createObjectURL(map) });
      heat.addEventListener("load", () => URL.revokeObjectURL(heat.src));
      shown.querySelector(".looked").append(heat);
    });
    return button;
  });
  return [element("div", { className: "words", role: "group", ariaLabel: "Where it looks at a word" }, ...buttons)];
}

async function begin(file, mask = null) {
  at("picture").open = true;
  try {
    await paint.open(file, mask);
    say("the picture to begin from is in the form");
    return true;
  } catch {
    say(`${file.name || "the file"} is no picture that this browser shows; choose a PNG, JPEG or WebP`, true);
  }
}

async function dropped(file) {
  if (!/^image\/png$/.test(file.type)) return begin(file); // others carry no settings
  try {
    const { settings, notices: missing } = await server.recipe(file);
    form.write(settings);
    const entry = { png: new Blob([file], { type: "image/png" }), settings, files: {} };
    await pictures.add(entry);
    at("empty").hidden = true;
    show(entry);
    say("its settings are in the form");
    tell(missing);
  } catch (error) {
    if (!(await begin(file))) say(error.message, true);
  }
}

// ---------------------------------------------------------------- the page

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
at("form").addEventListener(
  "invalid",
  (event) => {
    const field = event.target; // it may be in a part that is folded up, where the browser would say nothing
    for (let each = field.parentElement; each; each = each.parentElement) if (each.matches("details")) each.open = true;
    say(`${field.labels[0]?.textContent.trim() || field.name}: ${field.validationMessage}`, true);
  },
  true,
);
at("cancel").addEventListener("click", () => running?.abort());
at("reset").addEventListener("click", () => {
  form.write({});
  paint.close();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) (at("picture").contains(event.target) ? begin : dropped)(file);
});
at("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) begin(file);
});

try {
  const schema = await server.schema();
  form = build(schema, { words: at("words"), main: at("main"), beginning: at("beginning"), rest: at("rest") });
  pictures = await gallery(at("gallery"), show);
  at("empty").hidden = at("gallery").children.length > 0;
  document.body.dataset.ready = "true";
} catch (error) {
  say(error.message, true);
}
