// Escape stops an answer; texts go to the clipboard, also where a page without https has no clipboard of its own.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelector("#stop")?.click();
});
window.mavisWaiting = () => {
  const line = document.querySelector("#status .status");
  line.className = "status busy";
  line.textContent = "Waiting for a turn … Esc stops.";
};
window.mavisCopy = async (text, button) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const own = document.querySelector(button), label = own.textContent;
  own.textContent = "Copied";
  setTimeout(() => { own.textContent = label; }, 1200);
};
