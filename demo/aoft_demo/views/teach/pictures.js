// What the tiles and the trial share: the camera, a canvas to draw on, and pictures as files.

const SIDE = 320; // longest side of a picture in pixels
const NAMES = /\.(jpe?g|png|webp|gif|bmp|tiff?|heic|heif|avif)$/i;

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};

const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

const asBlob = (canvas, type = "image/png") =>
  new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));

/** A canvas with a picture of at most SIDE pixels; source is a video, an image or a bitmap. */
const shrunk = (source, width, height) => {
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = make("canvas", {
    width: Math.max(1, Math.round(width * scale)),
    height: Math.max(1, Math.round(height * scale)),
  });
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
};

/** A smaller copy of a large file; the file itself if it is small, or the browser cannot read it. */
const fileBlob = async (file) => {
  let bitmap = null;
  try {
    bitmap = await createImageBitmap(file);
    if (Math.max(bitmap.width, bitmap.height) <= SIDE) return file;
    return await asBlob(shrunk(bitmap, bitmap.width, bitmap.height));
  } catch {
    return file; // the demo says why it cannot be read
  } finally {
    bitmap?.close();
  }
};

/** The files of a drop, those in folders too. */
const droppedFiles = async (transfer) => {
  const entries = Array.from(transfer.items ?? [], (item) => item.webkitGetAsEntry?.());
  if (!entries.some(Boolean)) return Array.from(transfer.files);
  const files = [];
  const walk = async (entry) => {
    if (!entry || files.length >= 1000) return;
    if (entry.isFile) {
      files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return;
      some.sort((a, b) => a.name.localeCompare(b.name));
      for (const child of some) if (child.isFile ? NAMES.test(child.name) : true) await walk(child);
    }
  };
  for (const entry of entries) await walk(entry);
  return files;
};

/** Why there is no camera, in one sentence. */
const cameraProblem = (error) => {
  if (!navigator.mediaDevices) return "The browser gives the camera only to https or localhost.";
  if (error?.name === "NotAllowedError") return "The camera is not allowed: allow it in the browser's address bar.";
  if (error?.name === "NotFoundError") return "There is no camera: add files or draw instead.";
  return "The camera cannot be used: it may be in use by another program.";
};

/** The camera, in one video element at a time. */
const camera = {
  stream: null,
  async open(video) {
    this.close();
    const wanted = { video: { width: { ideal: 320 }, height: { ideal: 240 }, facingMode: "environment" } };
    const stream = await navigator.mediaDevices.getUserMedia(wanted);
    if (!video.isConnected) {
      stream.getTracks().forEach((track) => track.stop());
      return;
    }
    this.stream = video.srcObject = stream;
    await video.play();
  },
  close() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
  },
};

/** A canvas to draw on with a mouse, a pen or a finger. */
const drawing = (label) => {
  const canvas = make("canvas", { width: 192, height: 192, className: "paper", role: "img" });
  canvas.setAttribute("aria-label", label);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const clear = () => {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    canvas.dataset.empty = "yes";
  };
  clear();
  Object.assign(context, { lineWidth: 12, lineCap: "round", lineJoin: "round", strokeStyle: "#111" });
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * canvas.width) / box.width,
      ((event.clientY - box.top) * canvas.height) / box.height,
    ];
  };
  canvas.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    context.beginPath();
    context.moveTo(...place(event));
    context.lineTo(...place(event));
    context.stroke();
    delete canvas.dataset.empty;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    context.lineTo(...place(event));
    context.stroke();
  });
  return { canvas, clear };
};

/** Send a picture through the page's upload; its name is known to this page alone. */
const sent = async (blob, id) => {
  const kind = (blob.type.split("/")[1] ?? "").replace(/[^a-z]/g, "") || "bin";
  return (await upload(new File([blob], `teach-${id}.${kind}`, { type: blob.type }))).path;
};
