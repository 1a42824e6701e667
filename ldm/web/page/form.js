// The form, made of the server's schema: a field for each property, of its type, with its line.

const WORDS = ["prompt", "negative"];
const MAIN = ["model", "label", "n", "seed", "steps", "cfg", "sampler", "spacing", "width", "height"];
const SIMPLE = { string: "text", integer: "number", number: "number", boolean: "checkbox" };

export function element(tag, given = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...inside);
  return made;
}

// A number where there is one; "inf" and numbers that JavaScript cannot hold stay texts, which the server reads too.
function number(text) {
  const value = Number(text);
  return Number.isFinite(value) && (Math.abs(value) <= Number.MAX_SAFE_INTEGER || text.includes(".")) ? value : text;
}

function numbers(text) {
  return text.split(/[\s,;]+/).filter(Boolean).map(number);
}

const TITLES = { n: "pictures", cfg: "guidance (cfg)", negative: "not in the picture" };

function field(name, about, input, describe) {
  const id = `field-${name}`;
  const help = element("small", { id: `${id}-help` }, about.description || "");
  (input.matches("fieldset") ? input : Object.assign(input, { id })).setAttribute("aria-describedby", help.id);
  const title = TITLES[name] || name.replaceAll("_", " ");
  const label = input.matches("fieldset")
    ? element("span", { className: "title" }, title)
    : element("label", { htmlFor: id, title: about.description || "" }, title);
  if (input.matches("fieldset")) input.setAttribute("aria-label", title);
  return element("div", { className: `field ${describe ? "" : "brief"}` }, label, input, help);
}

// {node, get, set} of one property; `get` gives undefined where nothing is chosen.
function control(name, about) {
  const type = [about.type].flat()[0];
  const one = (input, get, set) => ({ node: input, get, set });
  if (about.enum) {
    const usual = about.default === null ? "as usual" : null;
    const options = about.enum.filter((each) => each !== null).map((each) => element("option", { value: each }, each));
    if (usual) options.unshift(element("option", { value: "" }, usual));
    const input = element("select", { name }, ...options);
    for (const option of options) option.title = about["x-about"]?.[option.value] || "";
    return one(input, () => input.value || undefined, (value) => (input.value = value ?? ""));
  }
  if (type === "array" && about.items?.enum) {
    const boxes = about.items.enum.map((each) => element("input", { type: "checkbox", value: each }));
    const input = element("fieldset", {}, ...boxes.map((box) => element("label", {}, box, ` ${box.value}`)));
    return one(
      input,
      () => boxes.filter((box) => box.checked).map((box) => box.value),
      (value) => boxes.forEach((box) => (box.checked = (value || []).includes(box.value))),
    );
  }
  if (type === "object") {
    const input = element("fieldset");
    const inputs = {};
    const offer = (usual) => {
      for (const [each, value] of Object.entries(usual)) {
        const kind = typeof value === "number" ? { type: "number", step: "any" } : { type: "text" };
        inputs[each] = element("input", { ...kind, placeholder: value ?? "off", name: `${name}.${each}` });
        input.append(element("label", {}, `${each.replaceAll("_", " ")} `, inputs[each]));
      }
      input.parentElement?.classList.toggle("nothing", !input.children.length);
    };
    offer(Object.fromEntries((about.propertyNames?.enum || []).map((each) => [each, null])));
    const made = one(
      input,
      () =>
        Object.fromEntries(
          Object.entries(inputs)
            .filter(([, each]) => each.value !== "")
            .map(([key, each]) => [key, number(each.value)]),
        ),
      (value) => Object.entries(inputs).forEach(([key, each]) => (each.value = value?.[key] ?? "")),
    );
    made.offer = (usual) => {
      input.replaceChildren();
      for (const key of Object.keys(inputs)) delete inputs[key];
      offer(usual);
    };
    return made;
  }
  if (type === "array") {
    const input = element("input", { type: "text", name, inputMode: "decimal", placeholder: "numbers" });
    return one(
      input,
      () => (input.value.trim() ? numbers(input.value) : undefined),
      (value) => (input.value = (value || []).join(" ")),
    );
  }
  if (type === "boolean") {
    const input = element("input", { type: "checkbox", name });
    return one(input, () => input.checked, (value) => (input.checked = Boolean(value)));
  }
  if (WORDS.includes(name)) {
    const input = element("textarea", { name, rows: name === "prompt" ? 3 : 1 });
    return one(input, () => input.value || undefined, (value) => (input.value = value ?? ""));
  }
  const input = element("input", { type: SIMPLE[type], name });
  if (type === "integer" || type === "number") {
    input.step = type === "integer" ? 1 : "any";
    for (const [end, key] of [["min", "minimum"], ["max", "maximum"]]) if (key in about) input[end] = about[key];
  }
  if (about.default === null) input.placeholder = name === "seed" ? "by chance" : "as usual";
  const parse = type === "string" ? (text) => text : number;
  return one(
    input,
    () => (input.value === "" ? undefined : parse(input.value)),
    (value) => (input.value = value ?? ""),
  );
}

// Builds the fields into the page; `read` gives what differs from the defaults, `write` puts settings in.
export function build(schema, places) {
  const controls = {};
  for (const name of [...new Set([...MAIN, ...Object.keys(schema.properties)])]) {
    const about = schema.properties[name];
    if (!about || about["x-file"]) continue;
    const choices = about.propertyNames?.enum ?? about.items?.enum ?? about.enum;
    if (choices && choices.filter((each) => each !== about.default).length < 1) continue; // nothing to choose from
    controls[name] = control(name, about);
    const place = WORDS.includes(name) ? "words" : MAIN.includes(name) ? "main" : about["x-part"];
    const node = field(name, about, controls[name].node, place !== "main" && place !== "words");
    (places[place] || places.rest).append(node);
  }
  const model = () => controls.model?.get() || Object.keys(schema["x-side"])[0];
  const follow = () => {
    const usual = schema["x-usual"][model()];
    const options = { ...schema.properties.sampler["x-options"][controls.sampler.get() ?? usual.sampler] };
    delete options.eta; // it has a field of its own
    const before = controls.options.get();
    controls.options.offer(options);
    controls.options.set(before);
    const labels = schema["x-labels"][model()] || [];
    controls.label.node.parentElement.hidden = !labels.length;
    controls.label.node.setAttribute("list", "labels");
    document.getElementById("labels")?.remove();
    document.body.append(
      element("datalist", { id: "labels" }, ...labels.map((each) => element("option", { value: each }))),
    );
    for (const side of ["width", "height"]) controls[side].node.placeholder = schema["x-side"][model()];
    for (const name of ["steps", "cfg"]) controls[name].node.placeholder = usual[name];
    controls.sampler.node.options[0].textContent = `as usual: ${usual.sampler}`;
  };
  const write = (settings) => {
    for (const [name, each] of Object.entries(controls)) {
      if (name !== "options") each.set(settings[name] ?? schema.properties[name].default);
    }
    follow();
    controls.options.set(settings.options || {});
  };
  controls.sampler.node.addEventListener("change", follow);
  controls.model?.node.addEventListener("change", follow);
  write({});
  const read = () => {
    const found = {};
    for (const [name, each] of Object.entries(controls)) {
      const value = each.get();
      const usual = schema.properties[name].default;
      if (value !== undefined && JSON.stringify(value) !== JSON.stringify(usual)) found[name] = value;
    }
    return found;
  };
  return { read, write, controls };
}
