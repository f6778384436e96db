// The rows: buttons with data-act trigger events; files are uploaded and added.
const list = () => element.querySelector("input[type=file]");
const say = (text) => { const line = element.querySelector(".sending"); if (line) line.textContent = text; };
const MOST = 16;

// Switches that the visitor has moved: rows from before the move do not move them back.
const wanted = new Map();
watch("value", () => {
  for (const [name, { on, until }] of wanted) {
    const button = element.querySelector(`[data-act=switched][data-name="${CSS.escape(name)}"]`);
    const moved = button?.getAttribute("aria-checked") !== String(on);
    if (button && moved && performance.now() < until) button.setAttribute("aria-checked", on);
    else wanted.delete(name);
  }
});

async function add(files) {
  if (!files.length) return say("There is no checkpoint among these files: give model.ckpt files.");
  if (files.length > MOST) return say(`Add at most ${MOST} files at once: these are ${files.length}.`);
  const sent = [];
  for (const { file, name } of files) {
    const problem = aoft.tooLarge(file, name);
    if (problem) return say(problem);
    say(`Sending ${name} …`);
    try {
      sent.push({ path: (await upload(file)).path, name });
    } catch (error) {
      say(`${name} was not sent: ${String(error.message || error).slice(0, 200)}`);
      return;
    }
  }
  say("");
  trigger("added", { files: sent });
}

const isCheckpoint = (name) => /\.(ckpt|safetensors)$/i.test(name);

async function inFolder(entry) {
  const reader = entry.createReader();
  const found = [];
  for (;;) { // a browser gives at most 100 entries at once
    const some = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
    if (!some.length) return found;
    found.push(...some);
  }
}

async function dropped(entry, depth) {
  if (entry.isFile) {
    const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
    return file ? [{ file, name: entry.fullPath.replace(/^\//, "") }] : [];
  }
  if (!depth) return [];
  const found = [];
  for (const child of await inFolder(entry)) {
    found.push(...(await dropped(child, depth - 1)).filter(({ name }) => isCheckpoint(name)));
  }
  return found;
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  const { act, name } = button.dataset;
  if (act === "choose") return list().click();
  if (act === "switched") {
    const on = button.getAttribute("aria-checked") !== "true";
    button.setAttribute("aria-checked", on);
    wanted.set(name, { on, until: performance.now() + 10000 });
    return trigger("switched", { name, on });
  }
  if (act === "proved") {
    const panel = document.querySelector("#proof");
    panel.querySelector("h2")?.replaceChildren(`Proving ${name} …`);
    if (window.innerWidth < 700) panel.scrollIntoView({ block: "start" });
    return trigger("proved", { name });
  }
  if (act === "removed") return trigger("removed", { name });
  if (act === "restored") return trigger("restored", {});
});
element.addEventListener("change", (event) => {
  if (event.target !== list()) return;
  const files = [...list().files].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
  list().value = "";
  add(files);
});
element.addEventListener("dragover", (event) => {
  event.preventDefault();
  element.querySelector(".drop")?.classList.add("over");
});
element.addEventListener("dragleave", () => element.querySelector(".drop")?.classList.remove("over"));
element.addEventListener("drop", async (event) => {
  event.preventDefault();
  element.querySelector(".drop")?.classList.remove("over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const files = [];
  for (const entry of entries) files.push(...(await dropped(entry, 3)));
  add(files);
});

element.dataset.ready = "";
