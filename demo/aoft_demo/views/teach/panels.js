// What opens in a tile: the camera, or a canvas to draw on. Both give pictures to `add`.

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
