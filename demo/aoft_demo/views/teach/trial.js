// The trial of the new skill: frames of the camera, one at a time, a picture, or a drawing.

const EVERY = 500;
const stage = element.querySelector(".stage");
const answer = element.querySelector(".answer");
const [shoot, choose, draw] = element.querySelectorAll(".row button");
const files = element.querySelector("input[type=file]");
const title = element.querySelector("h2 b");
let skill = "", asked = 0, live = 0, waiting = 0, next = null, shown = "";

const showTrial = () => {
  element.firstElementChild.hidden = !skill;
  title.textContent = skill;
};

const say = (sentence) => answer.replaceChildren(make("p", { className: "problem", textContent: sentence, role: "alert" }));

/** Ask about a picture. While an answer is awaited, the latest picture waits and replaces earlier ones. */
const tryPicture = async (blob, name) => {
  next = { blob, name };
  if (waiting) return;
  while (next) {
    const picture = next;
    next = null;
    const problem = aoft.tooLarge(picture.blob, picture.name);
    if (problem) {
      say(problem);
      continue;
    }
    const number = (asked += 1);
    try {
      const path = await sent(picture.blob, newId());
      await new Promise((resolve) => {
        waiting = resolve;
        setTimeout(resolve, 15000);
        trigger("attempt", { number, path, name: picture.name, skill });
      });
    } catch {
      say(`${picture.name} was not sent: the demo does not answer.`);
    }
    waiting = 0;
  }
};

watch("value", () => {
  const reply = JSON.parse(props.value || "{}");
  if (reply.skill !== undefined) {
    if (reply.skill !== skill) answer.replaceChildren();
    skill = reply.skill;
    showTrial();
  }
  if (reply.number === asked && reply.html !== undefined) {
    answer.innerHTML = reply.html; // escaped by the demo
    if (waiting) waiting();
  }
});

const stopStage = () => {
  clearInterval(live);
  live = 0;
  next = null;
  camera.close();
  if (shown) URL.revokeObjectURL(shown);
  shown = "";
  stage.replaceChildren();
  for (const button of [shoot, draw]) button.setAttribute("aria-expanded", "false");
};

shoot.onclick = async () => {
  const again = shoot.getAttribute("aria-expanded") === "true";
  stopStage();
  if (again) return;
  shoot.setAttribute("aria-expanded", "true");
  const video = make("video", { muted: true, playsInline: true });
  video.setAttribute("aria-label", "Camera");
  stage.append(video);
  try {
    await camera.open(video);
  } catch (error) {
    stopStage();
    say(cameraProblem(error));
    return;
  }
  live = setInterval(async () => {
    if (waiting || video.readyState < 2 || document.hidden) return;
    tryPicture(await asBlob(shrunk(video, video.videoWidth, video.videoHeight)), "The camera's picture");
  }, EVERY);
};

const tryFile = async (file) => {
  if (!file) return;
  stopStage();
  const blob = await fileBlob(file);
  shown = URL.createObjectURL(blob);
  const image = make("img", { src: shown, alt: file.name });
  image.onerror = () => image.remove();
  stage.append(image);
  tryPicture(blob, file.name);
};

choose.onclick = () => files.click();
files.onchange = () => {
  tryFile(files.files[0]);
  files.value = "";
};

draw.onclick = () => {
  const again = draw.getAttribute("aria-expanded") === "true";
  stopStage();
  if (again) return;
  draw.setAttribute("aria-expanded", "true");
  const { canvas, clear } = drawing("Drawing to try");
  canvas.addEventListener("pointerup", async () => tryPicture(await asBlob(canvas), "The drawing"));
  const wipe = make("button", { type: "button", textContent: "Clear" });
  wipe.onclick = clear;
  stage.append(canvas, wipe);
};

element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", async (event) => {
  event.preventDefault();
  tryFile((await droppedFiles(event.dataTransfer))[0]);
});

showTrial();

// A tab that is left lets go of the camera.
new ResizeObserver(([entry]) => {
  if (!entry.contentRect.width && live) stopStage();
}).observe(element);
