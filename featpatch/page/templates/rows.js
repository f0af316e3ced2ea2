// A row whose first cell reads "▸ 3" leads to the card "card-3", which opens; by mouse, and by Enter. So does a link to a card.
const open = card => { card.open = true; card.scrollIntoView({block: "start"}); card.querySelector("summary").focus({preventScroll: true}); };
const cardOf = row => {
  const mark = row?.cells?.[0]?.innerText.match(/^▸ (\d+)$/);
  return mark && document.getElementById("card-" + mark[1]);
};
const follows = event => {
  const link = event.target.closest?.('a[href^="#card-"]');
  const card = link ? document.querySelector(link.hash) : cardOf(event.target.closest?.("#ranking tbody tr"));
  if (!card || (event.type === "keydown" && (link || event.key !== "Enter"))) return;
  event.preventDefault();
  open(card);
};
document.addEventListener("click", follows);
document.addEventListener("keydown", follows);
const ranking = document.querySelector("#ranking");
if (ranking) new MutationObserver(() => {
  for (const row of ranking.querySelectorAll("tbody tr:not(.opens)"))
    if (cardOf(row)) { row.classList.add("opens"); row.tabIndex = 0; }
}).observe(ranking, {childList: true, subtree: true});
