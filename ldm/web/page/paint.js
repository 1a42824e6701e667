// The picture to begin from, and the mask that is painted over it: by pointer, or by arrows and the space bar.

import { element } from "./form.js";

const PAINT = "rgb(50 80 255)";

export function painter(root) {
  const base = element("canvas", { className: "base" });
  const cover = element("canvas", { className: "cover", tabIndex: 0, role: "application" });
  cover.setAttribute("aria-label", "Mask: paint what is to be drawn anew. Arrows move the brush, space paints.");
  const brush = cover.getContext("2d", { willReadFrequently: true });
  const cursor = element("div", { className: "cursor", hidden: true });
  const stack = element("div", { className: "stack" }, base, cover, cursor);
  const size = element("input", { type: "range", id: "brush", min: 1, max: 100, value: 45 });
  const erase = element("input", { type: "checkbox", id: "erase" });
  const button = (text, work) => {
    const made = element("button", { type: "button", className: "quiet" }, text);
    made.addEventListener("click", work);
    return made;
  };
  const tools = element(
    "div",
    { className: "tools" },
    element("label", {}, "brush ", size),
    element("label", {}, erase, " erase"),
    button("Undo", () => { strokes.pop(); redraw(); }),
    button("Clear mask", () => { strokes = []; redraw(); }),
    button("Remove picture", () => close()),
  );
  const editor = element("div", { className: "editor", hidden: true }, stack, tools);
  root.append(editor);

  let image = null; // the file, as it was given
  let strokes = []; // {layer} of a mask that was given, or {width, erase, points}
  let current = null;
  let at = null; // where the keyboard's brush is

  const width = () => Math.max(1, (Number(size.value) / 100) ** 2 * Math.max(base.width, base.height) * 0.6);

  function trace(context, { width, erase, points, layer }) {
    if (layer) return context.drawImage(layer, 0, 0);
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.strokeStyle = PAINT;
    context.lineWidth = width;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(points[0][0] + 0.01, points[0][1]); // a line of no length would leave no dot
    for (const point of points) context.lineTo(...point);
    context.stroke();
    context.globalCompositeOperation = "source-over";
  }

  function redraw() {
    brush.clearRect(0, 0, cover.width, cover.height);
    for (const each of strokes) trace(brush, each);
  }

  function begin(point) {
    current = { width: width(), erase: erase.checked, points: [point] };
    strokes.push(current);
    trace(brush, current);
  }

  function move(point) {
    if (!current) return;
    trace(brush, { ...current, points: [current.points.at(-1), point] });
    current.points.push(point);
  }

  function place(event) {
    const box = cover.getBoundingClientRect();
    return [((event.clientX - box.left) * cover.width) / box.width, ((event.clientY - box.top) * cover.height) / box.height];
  }

  function show(point) {
    const scale = cover.getBoundingClientRect().width / cover.width;
    Object.assign(cursor.style, {
      left: `${point[0] * scale}px`,
      top: `${point[1] * scale}px`,
      width: `${width() * scale}px`,
      height: `${width() * scale}px`,
    });
    cursor.hidden = false;
  }

  cover.addEventListener("pointerdown", (event) => {
    cover.setPointerCapture(event.pointerId);
    begin(place(event));
  });
  cover.addEventListener("pointermove", (event) => {
    show(place(event));
    move(place(event));
  });
  for (const end of ["pointerup", "pointercancel"]) cover.addEventListener(end, () => (current = null));
  cover.addEventListener("pointerleave", () => (cursor.hidden = true));
  cover.addEventListener("blur", () => (cursor.hidden = true));
  cover.addEventListener("keydown", (event) => {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    at ??= [base.width / 2, base.height / 2];
    if (event.key in ways) {
      const [x, y] = ways[event.key];
      const step = Math.max(1, width() / 2);
      at = [Math.min(base.width, Math.max(0, at[0] + x * step)), Math.min(base.height, Math.max(0, at[1] + y * step))];
    } else if (event.key === " ") {
      begin(at);
      current = null;
    } else return;
    event.preventDefault();
    show(at);
  });

  // The mask's file, white where painted, black elsewhere; null where nothing is.
  async function mask() {
    const data = brush.getImageData(0, 0, cover.width, cover.height);
    let some = false;
    for (let i = 0; i < data.data.length; i += 4) {
      const painted = data.data[i + 3] > 0;
      some ||= painted;
      data.data.fill(painted ? 255 : 0, i, i + 3);
      data.data[i + 3] = 255;
    }
    if (!some) return null;
    const canvas = new OffscreenCanvas(cover.width, cover.height);
    canvas.getContext("2d").putImageData(data, 0, 0);
    return canvas.convertToBlob({ type: "image/png" });
  }

  // What is painted of a mask's file: white becomes paint.
  async function layer(file) {
    const canvas = new OffscreenCanvas(cover.width, cover.height);
    const context = canvas.getContext("2d");
    context.drawImage(await createImageBitmap(file), 0, 0);
    const data = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < data.data.length; i += 4) data.data.set([50, 80, 255, data.data[i]], i);
    context.putImageData(data, 0, 0);
    return { layer: canvas };
  }

  // Raises where the browser cannot show the file.
  async function open(file, painted = null) {
    const bitmap = await createImageBitmap(file);
    for (const each of [base, cover]) Object.assign(each, { width: bitmap.width, height: bitmap.height });
    base.getContext("2d").drawImage(bitmap, 0, 0);
    image = file;
    at = null;
    strokes = painted ? [await layer(painted)] : [];
    redraw();
    editor.hidden = false;
    root.classList.add("open");
  }

  function close() {
    image = null;
    strokes = [];
    editor.hidden = true;
    root.classList.remove("open");
  }

  // {image, mask} to be sent, those that there are.
  async function files() {
    if (!image) return {};
    const painted = await mask();
    return painted ? { image, mask: painted } : { image };
  }

  return { open, close, files };
}
