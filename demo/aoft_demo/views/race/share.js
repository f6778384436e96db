// Saves the result of a race as a PNG of 1200 × 630, drawn from the SVG that the page shows.
element.addEventListener("click", async (event) => {
  const button = event.target.closest(".save");
  if (!button) return;
  const image = element.querySelector(".share img");
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [1200, 630];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "race.png";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});
