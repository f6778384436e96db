// The tiles: two to four classes with their pictures. The page holds the pictures' names and
// thumbnails, the demo the pictures themselves.

const LEAST = 3, MOST = 200, TILES = 4, EVERY = 125, BURST = 3000;
const list = element.querySelector(".tiles");
const more = element.querySelector(".more");
const classes = [];
let bursts = 0, panel = null;

const plural = (count) => `${count} picture${count === 1 ? "" : "s"}`;
const shownName = (tile) => tile.input.value.trim() || `class ${classes.indexOf(tile) + 1}`;

// ---- what a tile says -------------------------------------------------------------------------

const describe = (tile) => {
  const kept = tile.pictures.filter((picture) => picture.state === "kept").length;
  const waiting = tile.pictures.length - kept;
  const missing = LEAST - tile.pictures.length;
  let text = plural(kept);
  if (waiting) text += `, ${waiting} more on the way`;
  else if (missing > 0) text = kept ? `${text}: ${missing} more needed` : `Needs at least ${LEAST} pictures`;
  else if (kept < 20) text += ": 20 to 40 different ones work best";
  tile.count.textContent = text;
  tile.root.dataset.count = kept;
  tile.root.classList.toggle("ready", kept >= LEAST);
  tile.strip.hidden = !tile.pictures.length;
  element.dataset.waiting = classes.reduce((sum, t) => sum + t.pictures.filter((p) => p.state !== "kept").length, 0);
};

const complain = (tile, sentence) => {
  const sentences = tile.problems.firstElementChild;
  sentences.append(make("li", { textContent: sentence }));
  tile.problems.hidden = false;
  while (sentences.children.length > 5) sentences.firstElementChild.remove();
};

const number = (tile) => {
  const name = shownName(tile);
  tile.pictures.forEach((picture, i) => {
    picture.image.alt = `picture ${i + 1} of ${name}`;
    picture.button.setAttribute("aria-label", `Remove picture ${i + 1} of ${name}`);
  });
  tile.root.setAttribute("aria-label", name);
  tile.gone.setAttribute("aria-label", `Remove ${name}`);
};

const forget = (tile, picture) => {
  if (!tile.pictures.includes(picture)) return;
  tile.pictures.splice(tile.pictures.indexOf(picture), 1);
  picture.item.remove();
  URL.revokeObjectURL(picture.image.src);
  number(tile);
  describe(tile);
};

// ---- tiles -------------------------------------------------------------------------------------

const addFiles = async (tile, files) => {
  tile.problems.firstElementChild.replaceChildren();
  tile.problems.hidden = true;
  tile.full = false;
  for (const file of files) add(tile, await fileBlob(file), file.name, 0);
};

const freeName = () => {
  const taken = classes.map(shownName);
  return Array.from({ length: TILES }, (_, i) => `Class ${i + 1}`).find((name) => !taken.includes(name));
};

const addTile = () => {
  const tile = { pictures: [], full: false };
  const [place, name] = [classes.length + 1, freeName()];
  tile.input = make("input", { type: "text", value: name, maxLength: 40, placeholder: "Name", autocomplete: "off" });
  tile.input.setAttribute("aria-label", `Name of class ${place}`);
  tile.gone = make("button", { type: "button", className: "gone", textContent: "✕" });
  tile.count = make("p", { className: "count" });
  tile.count.setAttribute("aria-live", "polite");
  tile.strip = make("ul", { className: "strip", hidden: true });
  tile.problems = make("div", { className: "problems", role: "alert", hidden: true }, make("ul"));
  const files = make("input", { type: "file", multiple: true, accept: "image/*,.heic,.heif,.tif,.tiff", hidden: true });
  const buttons = ["Camera", "Files", "Draw"].map((textContent) => make("button", { type: "button", textContent }));
  const [shoot, choose, draw] = buttons;
  for (const button of [shoot, draw]) button.setAttribute("aria-expanded", "false");
  shoot.onclick = () => openPanel(tile, shoot, cameraPanel);
  draw.onclick = () => openPanel(tile, draw, drawingPanel);
  choose.onclick = () => files.click();
  files.onchange = () => {
    addFiles(tile, Array.from(files.files));
    files.value = "";
  };
  tile.input.oninput = () => number(tile);
  tile.gone.onclick = () => {
    if (panel && tile.root.contains(panel.root)) closePanel();
    removed.push(...tile.pictures.filter((p) => p.state === "kept").map((p) => p.id));
    [...tile.pictures].forEach((picture) => forget(tile, picture));
    classes.splice(classes.indexOf(tile), 1);
    tile.root.remove();
    arrange();
    ask();
    (classes.at(-1)?.input ?? more).focus();
  };
  tile.root = make(
    "section",
    { className: "teach-card tile" },
    make("div", { className: "name" }, tile.input, tile.gone),
    tile.strip,
    tile.count,
    tile.problems,
    make("div", { className: "row" }, ...buttons, files),
  );
  tile.root.addEventListener("dragover", (event) => {
    event.preventDefault();
    tile.root.classList.add("over");
  });
  tile.root.addEventListener("dragleave", () => tile.root.classList.remove("over"));
  tile.root.addEventListener("drop", async (event) => {
    event.preventDefault();
    event.stopPropagation();
    tile.root.classList.remove("over");
    addFiles(tile, await droppedFiles(event.dataTransfer));
  });
  classes.push(tile);
  list.insertBefore(tile.root, more);
  number(tile);
  describe(tile);
  arrange();
  return tile;
};

const arrange = () => {
  more.hidden = classes.length >= TILES;
  classes.forEach((tile, i) => {
    tile.gone.hidden = classes.length <= 2;
    tile.input.setAttribute("aria-label", `Name of class ${i + 1}`);
  });
};

more.onclick = () => addTile().input.select();
addTile();
addTile();

/** The classes for the button Teach, once the pictures on the way have arrived. */
window.aoftClasses = async () => {
  closePanel();
  const end = Date.now() + 60000;
  while (element.dataset.waiting !== "0" && Date.now() < end) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  document.querySelector("#teach-bar").scrollIntoView({ block: innerWidth < 760 ? "start" : "nearest" });
  return JSON.stringify(
    classes.map((tile) => ({
      name: tile.input.value,
      pictures: tile.pictures.filter((p) => p.state === "kept").map((p) => [p.id, p.burst]),
    })),
  );
};

// A tab that is left lets go of the camera.
new ResizeObserver(([entry]) => {
  if (!entry.contentRect.width && panel) closePanel();
}).observe(element);
