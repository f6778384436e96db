// Pictures on their way: uploads in parallel, then one request at a time for all that have arrived.

const uploads = [], arrived = [], removed = [], underway = new Map();
let uploading = 0, asked = 0, timer = 0;

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
    const problem = aoft.tooLarge(picture.blob, picture.name);
    if (problem) {
      refuse(picture, problem);
      continue;
    }
    uploading += 1;
    sent(picture.blob, picture.id)
      .then((path) => arrived.push({ picture, path }))
      .catch(() => refuse(picture, `${picture.name} was not sent: the demo does not answer.`))
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
