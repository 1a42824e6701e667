// The pictures of this browser, newest first, kept in it and nowhere else.

import { element } from "./form.js";

const KEPT = 200;

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("ldm", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function asked(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// `choose(entry)` is called for the one that is clicked. An entry: {png, settings, files}.
export async function gallery(list, choose) {
  const base = await opened().catch(() => null); // a private window may have none: then they last as long as the page
  const store = (mode) => base.transaction("pictures", mode).objectStore("pictures");

  function show(entry) {
    const { seed, prompt, label } = entry.settings;
    const title = [label, prompt].filter(Boolean).join(", ") || "no prompt";
    const picture = element("img", { src: URL.createObjectURL(entry.png), alt: title });
    const button = element("button", { type: "button", title: `${title}, seed ${seed}` }, picture);
    entry.node = element("li", {}, button);
    button.addEventListener("click", () => choose(entry));
    list.prepend(entry.node);
  }

  async function add(entry) {
    const { png, settings, files, words } = entry;
    if (base) entry.id = await asked(store("readwrite").add({ png, settings, files, words })).catch(() => undefined);
    show(entry);
    while (list.children.length > KEPT) list.lastElementChild.remove();
    if (base) {
      const keys = await asked(store("readonly").getAllKeys());
      if (keys.length > KEPT) await asked(store("readwrite").delete(IDBKeyRange.upperBound(keys.at(-KEPT - 1))));
    }
  }

  async function remove(entry) {
    URL.revokeObjectURL(entry.node.querySelector("img").src);
    entry.node.remove();
    if (base && entry.id !== undefined) await asked(store("readwrite").delete(entry.id));
  }

  for (const entry of base ? await asked(store("readonly").getAll()) : []) show(entry);
  return { add, remove };
}
