// The tiles: two to four classes with their pictures. The page holds the pictures' names and
// thumbnails, the demo the pictures themselves.

const LEAST = 3, MOST = 200, TILES = 4, EVERY = 125, BURST = 3000;
const list = element.querySelector(".tiles");
const more = element.querySelector(".more");
const classes = [];
let bursts = 0, asked = 0, panel = null;

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
  tile.problems.append(make("li", { textContent: sentence }));
  tile.problems.hidden = false;
  while (tile.problems.children.length > 5) tile.problems.firstChild.remove();
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

// ---- sending: uploads in parallel, then one request at a time for all that have arrived ----------

const uploads = [], arrived = [], removed = [], underway = new Map();
let uploading = 0, timer = 0;

const add = (tile, blob, name, burst) => {
  if (tile.pictures.length >= MOST) {
    if (!tile.full) complain(tile, `A class has at most ${MOST} pictures: the others were left out.`);
    tile.full = true;
    return;
  }
  const picture = { id: newId(), blob, name, burst, tile, state: "new" };
  picture.image = make("img", { src: URL.createObjectURL(blob) });
  picture.image.onerror = () => (picture.item.classList.add("unseen"));
  picture.button = make("button", { type: "button", textContent: "✕" });
  picture.button.onclick = () => {
    const next = picture.item.nextElementSibling ?? picture.item.previousElementSibling;
    if (picture.state === "kept") removed.push(picture.id);
    forget(tile, picture);
    (next?.querySelector("button") ?? tile.input).focus();
    ask();
  };
  picture.item = make("li", {}, picture.image, picture.button);
  tile.strip.append(picture.item);
  tile.strip.scrollLeft = tile.strip.scrollWidth;
  tile.pictures.push(picture);
  number(tile);
  describe(tile);
  uploads.push(picture);
  send();
};

const send = () => {
  while (uploading < 4 && uploads.length) {
    const picture = uploads.shift();
    if (!picture.tile.pictures.includes(picture)) continue;
    uploading += 1;
    sent(picture.blob, picture.id)
      .then((path) => arrived.push({ picture, path }))
      .catch(() => refuse(picture, `${picture.name} was not sent: it is too large, or the demo does not answer.`))
      .finally(() => {
        uploading -= 1;
        send();
        ask();
      });
  }
};

const refuse = (picture, sentence) => {
  complain(picture.tile, sentence);
  forget(picture.tile, picture);
};

const ask = () => {
  if (underway.size || (!arrived.length && !removed.length)) return;
  asked += 1;
  const pictures = arrived.splice(0, 40);
  pictures.forEach(({ picture }) => underway.set(picture.id, picture));
  if (!pictures.length) underway.set("", null);
  timer = setTimeout(() => answered({ kept: [], refused: {} }), 60000);
  trigger("pictures", {
    number: asked,
    add: pictures.map(({ picture, path }) => ({ id: picture.id, path, name: picture.name })),
    remove: removed.splice(0),
  });
};

const answered = ({ kept, refused }) => {
  clearTimeout(timer);
  for (const [id, picture] of underway) {
    if (!picture) continue;
    if (kept.includes(id)) {
      picture.state = "kept";
      picture.blob = null;
      if (picture.tile.pictures.includes(picture)) describe(picture.tile);
      else removed.push(id);
    } else {
      refuse(picture, refused[id] ?? `${picture.name} was not added: the demo does not answer.`);
    }
  }
  underway.clear();
  ask();
};

watch("value", () => {
  const reply = JSON.parse(props.value || "{}");
  if (reply.number === asked) answered(reply);
});

// ---- the camera and the drawing of a tile ------------------------------------------------------

const closePanel = () => {
  panel?.stop?.();
  panel?.root.remove();
  panel?.button.setAttribute("aria-expanded", "false");
  panel = null;
  camera.close();
};

const openPanel = (tile, button, build) => {
  const again = panel?.button === button;
  closePanel();
  if (again) return;
  panel = { button, root: make("div", { className: "panel" }) };
  button.setAttribute("aria-expanded", "true");
  tile.root.append(panel.root);
  build(tile, panel);
};

const cameraPanel = async (tile, own) => {
  const video = make("video", { muted: true, playsInline: true });
  video.setAttribute("aria-label", "Camera");
  const hold = make("button", { type: "button", className: "main", textContent: "Hold to record", disabled: true });
  const burst = make("button", { type: "button", textContent: "Record 3 seconds", disabled: true });
  own.root.append(video, make("div", { className: "row" }, hold, burst));
  let clock = 0;
  const shoot = async (burstNumber) => {
    if (video.readyState < 2) return;
    const canvas = shrunk(video, video.videoWidth, video.videoHeight);
    const blob = await asBlob(canvas);
    add(tile, blob, "The camera's picture", burstNumber);
  };
  const start = () => {
    if (clock) return;
    const numberOfBurst = (bursts += 1);
    own.root.classList.add("recording");
    shoot(numberOfBurst);
    clock = setInterval(() => shoot(numberOfBurst), EVERY);
  };
  own.stop = () => {
    clearInterval(clock);
    clock = 0;
    own.root.classList.remove("recording");
  };
  hold.addEventListener("pointerdown", (event) => {
    hold.setPointerCapture(event.pointerId);
    start();
  });
  for (const end of ["pointerup", "pointercancel", "blur"]) hold.addEventListener(end, own.stop);
  hold.addEventListener("contextmenu", (event) => event.preventDefault());
  hold.addEventListener("keydown", (event) => {
    if (![" ", "Enter"].includes(event.key)) return;
    event.preventDefault();
    start();
  });
  hold.addEventListener("keyup", own.stop);
  burst.onclick = () => {
    start();
    setTimeout(own.stop, BURST);
  };
  try {
    await camera.open(video);
    hold.disabled = burst.disabled = false;
  } catch (error) {
    own.root.replaceChildren(make("p", { role: "alert", textContent: cameraProblem(error) }));
  }
};

const drawingPanel = (tile, own) => {
  const { canvas, clear } = drawing(`Drawing for ${shownName(tile)}`);
  const put = make("button", { type: "button", className: "main", textContent: "Add drawing" });
  const wipe = make("button", { type: "button", textContent: "Clear" });
  put.onclick = async () => {
    if (canvas.dataset.empty) return;
    const copy = shrunk(canvas, canvas.width, canvas.height); // the next drawing may begin at once
    clear();
    add(tile, await asBlob(copy), "The drawing", 0);
  };
  wipe.onclick = clear;
  own.root.append(canvas, make("div", { className: "row" }, put, wipe));
};

// ---- tiles -------------------------------------------------------------------------------------

const addFiles = async (tile, files) => {
  tile.problems.replaceChildren();
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
  tile.problems = make("ul", { className: "problems", role: "alert", hidden: true });
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
  return JSON.stringify(
    classes.map((tile) => ({
      name: tile.input.value,
      pictures: tile.pictures.filter((p) => p.state === "kept").map((p) => [p.id, p.burst]),
    })),
  );
};

// A tab that is left lets go of the camera.
new IntersectionObserver(([seen]) => {
  if (!seen.isIntersecting && panel) closePanel();
}).observe(element);
