// The visitor's picture. The value is {example: N}, or {path: P} of an uploaded file.
const find = (selector) => element.querySelector(selector);
const [stage, shown, video, file] = [".stage", ".shown", "video", "input"].map(find);
const [camera, snap, wrong, sending] = [".camera", ".snap", ".wrong", ".sending"].map(find);
let stream = null;
let latest = 0;

function identity(value) {
  if (!value) return "";
  return value.path ? value.path.split("/").slice(-2, -1)[0] : `example-${value.example}`;
}

function address(value) {
  if (!value.path) return `aoft/example/${value.example}`;
  return `gradio_api/file=${value.path.split("/").map(encodeURIComponent).join("/")}`;
}

function show() {
  const value = props.value;
  stage.dataset.picture = identity(value);
  for (const button of element.querySelectorAll("[data-example]")) {
    const chosen = !!value && String(value.example) === button.dataset.example;
    button.setAttribute("aria-pressed", chosen);
    if (chosen) shown.alt = button.dataset.alt;
  }
  if (!value) return;
  if (value.path) shown.alt = "Your own picture";
  if (shown.getAttribute("src") !== address(value)) shown.src = address(value);
}

function busy(on) {
  stage.dataset.state = on ? "sending" : "";
  sending.hidden = !on;
}

function fail(text) {
  wrong.textContent = text;
  wrong.hidden = !text;
}

async function send(picture) {
  if (!picture) return;
  const number = ++latest;
  stop();
  const problem = aoft.tooLarge(picture, picture.name || "The picture");
  fail(problem);
  busy(!problem);
  if (problem) return;
  try {
    const { path } = await upload(picture);
    if (number !== latest) return;
    props.value = { path };
    show();
  } catch (error) {
    if (number === latest) fail(`${picture.name || "The picture"} was not sent: ${String(error.message || error).slice(0, 200)}`);
  } finally {
    if (number === latest) busy(false);
  }
}

function stop() {
  for (const track of stream ? stream.getTracks() : []) track.stop();
  stream = null;
  video.srcObject = null;
  video.hidden = snap.hidden = true;
  shown.hidden = false;
  camera.textContent = "Camera";
}

async function watchCamera() {
  if (stream) return stop();
  if (!navigator.mediaDevices) {
    file.setAttribute("capture", "environment");
    return file.click();
  }
  fail("");
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    video.srcObject = stream;
    video.hidden = snap.hidden = false;
    shown.hidden = true;
    camera.textContent = "Stop the camera";
    await video.play();
  } catch (error) {
    stop();
    fail("The camera does not answer: allow it in the browser, or upload a picture.");
  }
}

function take() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => send(blob && new File([blob], "camera.png", { type: "image/png" })), "image/png");
}

async function paste() {
  try {
    for (const item of await navigator.clipboard.read()) {
      const type = item.types.find((name) => name.startsWith("image/"));
      if (type) return send(new File([await item.getType(type)], `pasted.${type.slice(6)}`, { type }));
    }
    fail("There is no picture to paste: copy one first.");
  } catch (error) {
    fail("The browser does not allow this button to paste: press Ctrl+V or ⌘V instead.");
  }
}

const clicks = {
  upload: () => { file.removeAttribute("capture"); file.click(); },
  camera: watchCamera,
  snap: take,
  paste,
};
for (const [name, action] of Object.entries(clicks)) find(`.${name}`).addEventListener("click", action);
file.addEventListener("change", () => { send(file.files[0]); file.value = ""; });
for (const button of element.querySelectorAll("[data-example]")) {
  button.addEventListener("click", () => {
    latest += 1;
    stop();
    fail("");
    busy(false);
    props.value = { example: Number(button.dataset.example) };
    show();
  });
}
stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("over"); });
stage.addEventListener("dragleave", () => stage.classList.remove("over"));
stage.addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  send(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (!element.offsetParent || event.target.closest?.("input, textarea")) return;
  send([...event.clipboardData.files].find((one) => one.type.startsWith("image/")));
});
shown.addEventListener("error", () => { stage.dataset.unseen = ""; });
shown.addEventListener("load", () => { delete stage.dataset.unseen; });
watch("value", show);
show();
