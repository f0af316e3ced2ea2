// A row whose first cell reads "▸ 3" opens to <template id="card-3">, and closes again; by mouse, and by Enter.
const cardOf = row => {
  const mark = row?.cells[0]?.innerText.match(/^[▸▾] (\d+)$/);
  return mark && document.getElementById("card-" + mark[1]);
};
const toggle = event => {
  const row = event.target.closest?.("#ranking tbody tr");
  const card = cardOf(row);
  if (!card || (event.type === "keydown" && event.key !== "Enter")) return;
  const open = row.nextElementSibling?.classList.contains("opened");
  row.cells[0].innerText = row.cells[0].innerText.replace(/^./, open ? "▸" : "▾");
  if (open) return row.nextElementSibling.remove();
  const cell = document.createElement("td");
  cell.colSpan = row.cells.length;
  cell.append(card.content.cloneNode(true));
  const opened = document.createElement("tr");
  opened.className = "opened";
  opened.append(cell);
  row.after(opened);
};
document.addEventListener("click", toggle);
document.addEventListener("keydown", toggle);
const ranking = document.querySelector("#ranking");
if (ranking) new MutationObserver(() => {
  for (const row of ranking.querySelectorAll("tbody tr:not(.opens)"))
    if (cardOf(row)) { row.classList.add("opens"); row.tabIndex = 0; }
}).observe(ranking, {childList: true, subtree: true});
