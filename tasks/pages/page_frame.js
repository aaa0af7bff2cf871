// Shows the label of the mark under the pointer or finger. The page is complete without this script.
const pointed = document.getElementById("pointed");
document.addEventListener("pointerover", show);
document.addEventListener("pointerdown", show);
function show(event) {
  const mark = event.target.closest?.("figure svg [aria-label][role='graphics-symbol']");
  const speaks = mark && !["axis", "legend"].includes(mark.getAttribute("aria-roledescription"));
  pointed.style.display = speaks ? "block" : "none";
  if (!speaks) return;
  pointed.textContent = mark.getAttribute("aria-label");
  const box = mark.getBoundingClientRect();
  const right = document.documentElement.clientWidth - pointed.offsetWidth - 8;
  const left = box.left + box.width / 2 - pointed.offsetWidth / 2;
  pointed.style.left = `${scrollX + Math.max(8, Math.min(left, right))}px`;
  pointed.style.top = `${scrollY + box.top - pointed.offsetHeight - 6}px`;
}
// Writes the folder of the store into commands, if the page is opened in its place in the store.
const place = location.protocol === "file:" && decodeURIComponent(location.pathname).match(/^([\w@%+=:,.\/-]+)\/report\/\w+\/[^/]+\/report\.html$/);
if (place) document.querySelectorAll(".store").forEach((name) => (name.textContent = place[1]));
