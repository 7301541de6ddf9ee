// Everything is readable without this: it copies the program, says what the mark that is looked at is, and
// opens tables for print.
(() => {
  const button = document.querySelector(".copy");
  const code = document.getElementById("code");
  if (button && code) {
    const status = document.querySelector(".copied");
    button.hidden = false;
    button.addEventListener("click", async () => {
      let done = true;
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        // A page that was opened from a file may have no clipboard: select, then copy as by hand.
        getSelection().selectAllChildren(code);
        done = document.execCommand("copy");
      }
      status.textContent = done ? "Copied" : "Selected: copy it with your keyboard";
    });
  }
  for (const description of document.querySelectorAll(".description")) {
    const usual = "Point at a mark, or reach it with the tab key, for its figures.";
    description.textContent = usual;
    for (const point of description.parentElement.querySelectorAll(".point")) {
      const show = () => { description.textContent = point.getAttribute("aria-label"); };
      point.addEventListener("focus", show);
      point.addEventListener("mouseenter", show);
      point.addEventListener("click", show);
    }
  }
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details")) one.open = true;
  });
})();
