// The filters of the sample browser: kind of question, outcome of a response, iteration.
const choice = name => document.getElementById(name).value;
function filter() {
  for (const article of document.querySelectorAll('article')) {
    let any = false;
    for (const round of article.querySelectorAll('details')) {
      let some = false;
      for (const response of round.querySelectorAll('.response')) {
        const outcomes = ['any', ...response.dataset.outcome.split(' ')];
        response.hidden = !outcomes.includes(choice('outcome'));
        some ||= !response.hidden;
      }
      round.hidden = !some || !['any', round.dataset.iteration].includes(choice('iteration'));
      if (!round.hidden && choice('iteration') !== 'any') round.open = true;
      any ||= !round.hidden;
    }
    article.hidden = !any || !['any', article.dataset.kind].includes(choice('kind'));
  }
}
document.querySelector('.filter').hidden = false;
for (const select of document.querySelectorAll('select')) select.addEventListener('change', filter);
filter();
